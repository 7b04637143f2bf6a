"""Stand between a model's modules, and leave the model as it was found.

Calls are intercepted on :class:`torch.nn.Module` itself, for the current thread and only while a pass is running: no
hook, ``forward`` attribute or buffer of a model is ever touched. What must be changed for the duration (training
flags, ``requires_grad``, switches of torch) is borrowed and given back, also after an exception or an interrupt.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

Handler = Callable[..., Any]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_state = threading.local()
_lock = threading.RLock()
_interceptors = 0
_original_call: Any = None


@contextlib.contextmanager
def borrowing(*roots: Any, warn: bool = True) -> Iterator[None]:
    r"""Set the stage for recording and rerunning: autograd on, models in eval mode, parameters without gradients.

    Whatever is changed is given back at the end: the training flag of every module called, ``requires_grad`` of
    every parameter. Several threads may hold the same model at once; the last gives it back.

    Args:

        *roots: Modules known beforehand (modules met on the way are treated alike).
        warn (bool, optional): Whether to say that a model was in training mode. Default: True
    """
    borrower, outer = _Borrower(warn), getattr(_state, "borrower", None)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _plain_execution(), _standing_between():
            _state.borrower = borrower
            for root in roots:
                borrower.take(root)
            yield
    finally:
        _state.borrower = outer
        borrower.give_back()


@contextlib.contextmanager
def intercept(handler: Handler) -> Iterator[None]:
    """Route this thread's module calls through ``handler(proceed, module, args, kwargs)``."""
    with _standing_between():
        outer, _state.handler = current_handler(), handler
        try:
            yield
        finally:
            _state.handler = outer


@contextlib.contextmanager
def _standing_between() -> Iterator[None]:
    """Have module calls come by here. Each change of a class makes torch's next calls slow, so passes share one."""
    global _interceptors, _original_call
    with _lock:
        if _interceptors == 0:
            _original_call = nn.Module.__call__
            nn.Module.__call__ = _call  # type: ignore[method-assign]
        _interceptors += 1
    try:
        yield
    finally:
        with _lock:
            _interceptors -= 1
            if _interceptors == 0:
                nn.Module.__call__ = _original_call  # type: ignore[method-assign]


def met_modules() -> list[nn.Module]:
    """The modules that this thread's passes were said to use or have called so far, with all below them."""
    found: list[nn.Module] = _state.borrower.modules
    return found


def current_handler() -> Handler | None:
    """What this thread's module calls are routed through at present."""
    return getattr(_state, "handler", None)


@contextlib.contextmanager
def interpose(handler: Handler, is_observer: bool = False) -> Iterator[None]:
    """Route this thread's module calls through ``handler(proceed, aside, module, args, kwargs)``.

    ``proceed`` goes on to whatever intercepts already; ``aside`` runs the module without it, so that only the calls
    inside are seen there. An observer only looks on, and is left out of passes that are none of its.
    """
    outer = current_handler()

    def go_on(original: Handler, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(module, *args, **kwargs) if outer is None else outer(original, module, args, kwargs)

    def through(original: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if is_observer and getattr(_state, "unobserved", False):
            return go_on(original, module, *args, **kwargs)
        return handler(partial(go_on, original), original, module, args, kwargs)

    with intercept(through):
        yield


@contextlib.contextmanager
def unobserved(modes: int) -> Iterator[None]:
    """Run passes past every observer that is interposed, and past all but the first so many modes of functions."""
    outer, _state.unobserved = getattr(_state, "unobserved", False), True
    lifted = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack() - modes)]
    try:
        yield
    finally:
        for mode in reversed(lifted):
            torch._C._push_on_torch_function_stack(mode)
        _state.unobserved = outer


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    handler = current_handler()
    proceed = _original_call
    if handler is None:
        return proceed(module, *args, **kwargs)
    _refuse_compiled(module)
    _state.borrower.take(module)
    return handler(proceed, module, args, kwargs)


def _refuse_compiled(module: nn.Module) -> None:
    # Asked first, for every call of every module: what a module lacks takes long to find out.
    if hasattr(torch.compiler, "set_stance"):
        return
    if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
        raise RuntimeError(
            f"forward_func: {type(module).__name__} is compiled, and this version of torch ({torch.__version__}) "
            "cannot run it eagerly; pass the module that torch.compile was given."
        )


def is_stateless(module: nn.Module) -> bool:
    """Whether a module holds nothing: no parameters, no buffers, no other modules."""
    return not (module._parameters or module._buffers or module._modules)


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module does what its kind does and nobody looks on: no subclass, hook or ``forward`` of its own."""
    return type(module) is kind and "forward" not in vars(module) and not any(map(vars(module).get, _HOOKS))


@dataclass
class _Loan:
    """A module, parameter or configuration whose flag is changed while a run in any thread needs it so."""

    owner: Any
    value: Any
    holders: int = 0


_borrowed: dict[int, _Loan] = {}

# Where a configuration says how its modules attend.
_ATTENTION_SWITCHES = ("_attn_implementation", "_attn_implementation_internal")


class _Borrower:
    def __init__(self, warn: bool) -> None:
        self.modules: list[nn.Module] = []
        self._taken: dict[int, Any] = {}
        self._warned = not warn

    def take(self, root: nn.Module) -> None:
        if id(root) in self._taken:
            return
        for module in root.modules():
            if isinstance(module, nn.DataParallel):
                raise ValueError(
                    "forward_func: DataParallel replicates the model in threads of its own, where a layer cannot be "
                    "taken over; pass the wrapped module (model.module) and one batch per device."
                )
            if id(module) in self._taken:
                continue
            self.modules.append(module)
            # A function in a module's guise, made anew for each pass, is always in training mode: nobody chose it.
            self._borrow(module, "training", quietly=module is root and is_stateless(module))
            self._borrow_attention(getattr(module, "config", None))
            for parameter in module.parameters(recurse=False):
                if parameter.is_leaf:
                    self._borrow(parameter, "requires_grad")

    def _borrow_attention(self, config: Any) -> None:
        """Flex attention is compiled, or an operator that hides what it does; the same attention is to be had open."""
        for name in _ATTENTION_SWITCHES:
            if getattr(config, "__dict__", {}).get(name) == "flex_attention":
                self._borrow(config, name, instead="sdpa")

    def _borrow(self, owner: Any, flag: str, quietly: bool = False, instead: Any = False) -> None:
        if id(owner) in self._taken:
            return
        with _lock:
            loan = _borrowed.setdefault(id(owner), _Loan(owner, getattr(owner, flag)))
            loan.holders += 1
            self._taken[id(owner)] = flag
            if getattr(owner, flag) != instead:
                if flag == "training" and not self._warned and not quietly:
                    self._warned = True
                    warnings.warn(
                        "forward_func: the model is in training mode; it is explained in eval mode, and its mode is "
                        "restored afterwards. Call model.eval() to silence this.",
                        UserWarning,
                        stacklevel=2,
                    )
                setattr(owner, flag, instead)

    def give_back(self) -> None:
        with _lock:
            for key, flag in self._taken.items():
                loan = _borrowed[key]
                loan.holders -= 1
                if loan.holders == 0:
                    del _borrowed[key]
                    if getattr(loan.owner, flag) != loan.value:
                        setattr(loan.owner, flag, loan.value)
            self._taken.clear()


class _Uncheckpointed:
    """Runs what was to be checkpointed, and keeps its activations."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _around_uncheckpointed(*args: Any, **kwargs: Any) -> Iterator[None]:
    """What torch does before and after a function that it checkpoints: nothing."""
    yield


# What torch.utils.checkpoint.checkpoint, which models hold under names of their own, looks up when it is called.
_UNCHECKPOINTED = {
    "CheckpointFunction": _Uncheckpointed,
    "_checkpoint_without_reentrant_generator": _around_uncheckpointed,
}
_enter_inference, _exit_inference = torch.inference_mode.__enter__, torch.inference_mode.__exit__


def _enter(mode: Any) -> None:
    """Inference mode saves what gradients would need and changes no value, so it is left out where they are needed."""
    mode.is_skipped = mode.mode and getattr(_state, "borrower", None) is not None
    if not mode.is_skipped:
        _enter_inference(mode)


def _exit(mode: Any, *error: Any) -> None:
    if not getattr(mode, "is_skipped", False):
        _exit_inference(mode, *error)


_SKIPPING = {"__enter__": _enter, "__exit__": _exit}
_plain_holders = 0
_plain_exits = contextlib.ExitStack()


@contextlib.contextmanager
def _plain_execution() -> Iterator[None]:
    """Run modules as written, one by one, while any thread needs it so.

    Compiled code would run past the interception, transformer layers of torch skip their submodules when no gradient is
    needed, checkpointed modules would run again in the backward pass, where nothing stands between them, and what was
    made in inference mode has no gradient. These switches belong to the process.
    """
    global _plain_holders
    with _lock:
        if _plain_holders == 0:
            _plain_exits.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            for name, plain in _UNCHECKPOINTED.items():
                _plain_exits.callback(setattr, torch.utils.checkpoint, name, getattr(torch.utils.checkpoint, name))
                setattr(torch.utils.checkpoint, name, plain)
            for name, skipping in _SKIPPING.items():
                _plain_exits.callback(setattr, torch.inference_mode, name, getattr(torch.inference_mode, name))
                setattr(torch.inference_mode, name, skipping)
            if hasattr(torch.compiler, "set_stance"):
                _plain_exits.enter_context(torch.compiler.set_stance("force_eager"))
        _plain_holders += 1
    try:
        yield
    finally:
        with _lock:
            _plain_holders -= 1
            if _plain_holders == 0:
                _plain_exits.close()
