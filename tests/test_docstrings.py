"""Every public name says what it takes, what it returns, what it raises, and what its defaults are."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import pytest

ROOMS = ("captum_m2ib", *(f"captum_m2ib.{room}" for room in ("audit", "composition", "disent", "metrics", "scenes")))
MODULES = ("captum_m2ib.engine.information", "captum_m2ib.explanations.visualization")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Warns", "Examples")


def public_objects() -> Iterator[tuple[str, Any]]:
    """What the rooms export, and what the modules of the reference define."""
    for room in ROOMS:
        module = importlib.import_module(room)
        yield from ((f"{room}.{name}", getattr(module, name)) for name in module.__all__)
    for name in MODULES:
        module = importlib.import_module(name)
        for member, found in vars(module).items():
            if inspect.isfunction(found) and found.__module__ == name and not member.startswith("_"):
                yield f"{name}.{member}", found


def own_members(cls: type) -> dict[str, Any]:
    """The public members of a class that this package defines, inherited ones included."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("captum_m2ib"):
            found |= {name: member for name, member in vars(base).items() if not name.startswith("_")}
    return found


def documented() -> dict[str, tuple[Callable[..., Any], str, bool]]:
    """Name to the function whose signature counts, its docstring, and whether it returns something to describe."""
    found = {}
    for name, thing in public_objects():
        if inspect.isclass(thing):
            found[name] = (thing, inspect.getdoc(thing) or "", False)
            for member, value in own_members(thing).items():
                function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
                if inspect.isfunction(function):
                    function = inspect.unwrap(function)
                    found[f"{name}.{member}"] = (function, inspect.getdoc(function) or "", returns(function))
        elif inspect.isfunction(thing):
            found[name] = (thing, inspect.getdoc(thing) or "", returns(thing))
    return found


def returns(function: Callable[..., Any]) -> bool:
    return inspect.signature(function).return_annotation not in (None, "None")


def sections(doc: str) -> dict[str, str]:
    """A docstring's sections, each with its indentation taken away."""
    pattern = re.compile(rf"^({'|'.join(SECTIONS)})::?$((?:\n(?:[ \t].*)?)*)", re.M)
    return {match[1]: textwrap.dedent(match[2]).strip("\n") for match in pattern.finditer(doc)}


def entries(section: str) -> dict[str, str]:
    """The entries of ``Args`` or ``Attributes``: name to what is said of it."""
    found = {}
    for entry in re.split(r"\n(?=\S)", section.strip()):
        match = re.match(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \(([^:]*)\))?:\s*(.*)", entry.replace("\\*", "*"), re.S)
        assert match, f"no entry of the form 'name (type): text': {entry[:80]!r}"
        for name in match[1].split(", "):
            found[name.lstrip("*")] = f"{match[2] or ''} {match[3]}"
    return found


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    # Exceptions take whatever Python's own take.
    own = not (inspect.isclass(function) and issubclass(function, BaseException))
    given = inspect.signature(function).parameters if own else {}
    return {name: one for name, one in given.items() if name not in ("self", "cls") and not name.startswith("_")}


def raised(function: Callable[..., Any]) -> set[str]:
    """The names of the exceptions that the function's own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def undescribed_properties() -> list[str]:
    """Public properties without a docstring of their own or of a class that they come from."""
    return [
        f"{name}.{member}"
        for name, thing in public_objects()
        if inspect.isclass(thing)
        for member, value in own_members(thing).items()
        if isinstance(value, property)
        and not any(getattr(vars(base).get(member), "__doc__", None) for base in thing.__mro__)
    ]


DOCUMENTED = documented()
everything = pytest.mark.parametrize("name", DOCUMENTED)


def test_what_is_public_is_found():
    assert {"captum_m2ib.MultiModalInfoBottleneck.attribute", "captum_m2ib.metrics.top_k"} < DOCUMENTED.keys()
    assert len(DOCUMENTED) > 150


@everything
def test_a_docstring_says_what_it_is(name: str):
    assert re.match(r"\S.{10,}[.:;,]?", DOCUMENTED[name][1])


@everything
def test_parameters_are_documented(name: str):
    function, doc, _ = DOCUMENTED[name]
    found = sections(doc)
    said = entries(found.get("Args", "")) if "Args" in found else {}
    takes = parameters(function)
    if is_dataclass(function) or (inspect.isclass(function) and issubclass(function, tuple)):
        said = entries(found["Attributes"]) if "Attributes" in found else said
        assert takes.keys() <= said.keys()
    else:
        assert takes.keys() == said.keys()


@everything
def test_defaults_are_documented(name: str):
    function, doc, _ = DOCUMENTED[name]
    if inspect.isclass(function) and "Attributes" in sections(doc):
        return
    said = entries(sections(doc).get("Args", "")) if "Args" in sections(doc) else {}
    optional = [key for key, one in parameters(function).items() if one.default is not inspect.Parameter.empty]
    silent = [key for key in optional if not re.search(r"Default:|As (everywhere|for|in) ", said.get(key, ""))]
    assert silent == []


@everything
def test_what_is_returned_is_documented(name: str):
    _, doc, is_returning = DOCUMENTED[name]
    assert not is_returning or {"Returns", "Yields"} & sections(doc).keys()


@everything
def test_errors_are_documented(name: str):
    function, doc, _ = DOCUMENTED[name]
    if inspect.isclass(function):
        function = vars(function).get("__post_init__" if is_dataclass(function) else "__init__")
    if function is None or not inspect.isfunction(function) or function.__module__ is None:
        return
    said = sections(doc).get("Raises", "")
    assert {kind for kind in raised(function) - {"NotImplementedError"} if kind not in said} == set()


def test_properties_are_documented():
    assert undescribed_properties() == []


def test_the_parser_finds_what_is_missing():
    def undone(first: int, second: int = 2) -> int:
        r"""Example of a docstring that leaves things out.

        Args:

            first (int): Something.
            third (int): Nothing.
        """
        if first:
            raise ValueError("no")
        return second

    said = entries(sections(inspect.getdoc(undone) or "")["Args"])
    assert parameters(undone).keys() ^ said.keys() == {"second", "third"}
    assert raised(undone) == {"ValueError"} and returns(undone)
