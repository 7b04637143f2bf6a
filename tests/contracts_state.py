"""Everything about a model that a run could change, and whether it did."""

from __future__ import annotations

import torch
from families import Case
from torch import nn

HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
]


def snapshot(case: Case) -> dict:
    """Everything about a model that a run could change."""
    state: dict = {
        "call": nn.Module.__call__,
        "path": torch.backends.mha.get_fastpath_enabled(),
        "grad": torch.is_grad_enabled(),
        "inputs": [
            (tensor.requires_grad, tensor._version, tensor.clone())
            for tensor in (*case.inputs, *case.additional)
            if isinstance(tensor, torch.Tensor)
        ],
    }
    roots = [*case.roots, *([case.forward] if isinstance(case.forward, nn.Module) else [])]
    for index, root in enumerate(roots):
        for name, module in root.named_modules():
            state[index, name] = (
                module.training,
                "forward" in module.__dict__,
                set(module.__dict__),
                [dict(getattr(module, hooks)) for hooks in HOOKS],
                list(module._modules),
            )
        for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
            grad = None if tensor.grad is None else tensor.grad.clone()
            state[index, name, "tensor"] = (
                id(tensor),
                tensor.requires_grad,
                tensor._version,
                tensor.detach().clone(),
                grad,
            )
    return state


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or one == other


def assert_as_found(case: Case, before: dict) -> None:
    after = snapshot(case)
    assert list(after) == list(before)
    changed = [key for key in before if not same(before[key], after[key])]
    assert not changed


def disturb(case: Case) -> None:
    """A mixture of flags, a gradient and a user's hook, so that nothing is as a new model has it."""
    for root in case.roots:
        for index, parameter in enumerate(root.parameters()):
            parameter.requires_grad_(index % 2 == 0)
        next(root.parameters()).grad = torch.ones_like(next(root.parameters()))
        for index, module in enumerate(root.modules()):
            module.training = case.training and index % 3 != 0
        next(root.children()).register_forward_hook(lambda *_: None)
