"""The rooms of the package: which may import which, and that no two modules import each other."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import captum_m2ib

PACKAGE = Path(captum_m2ib.__file__).parent

# A room imports only from itself and from lines above its own.
FLOORS = (
    {"_captum", "_lazy"},
    {"engine"},
    {"encoders"},
    {"attr", "scenes"},
    {"metrics"},
    {"explanations"},
    {"composition", "disent", "audit"},
    {"games"},
    {"benchmark", "app"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# The package's own __init__ names what users type, from every room.
MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


@functools.cache
def imports_of(name: str) -> frozenset[str]:
    """The package's modules that one of them imports anywhere, functions and type checking included."""
    found, path = set(), MODULES[name]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            named = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in named:
            package, _, inside = module.partition(".")
            if package == PACKAGE.name:
                longer = f"{inside}.{name}".strip(".")
                found.add(longer if longer in MODULES else inside)
    # ``from captum_m2ib import X`` of a public name reaches every room.
    return frozenset(found)


def test_every_module_has_a_room():
    assert {name.split(".")[0] for name in MODULES} == set(FLOOR)


@pytest.mark.parametrize("name", MODULES)
def test_rooms_import_downwards(name: str):
    room = name.split(".")[0]
    for imported in imports_of(name) - {""}:
        other = imported.split(".")[0]
        assert other == room or FLOOR[other] < FLOOR[room], f"{name} imports {imported}"
    assert "" not in imports_of(name) or room in {"cli", "__main__"}, f"{name} imports the package's public names"


def test_no_two_modules_import_each_other():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        # A package's __init__ names what its modules define; only what those import counts.
        for imported in sorted(imports_of(name) & set(MODULES)):
            visit(imported, (*path, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


def test_the_engine_knows_no_models():
    for name, path in MODULES.items():
        if name.split(".")[0] == "engine":
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            names |= {node.module or "" for node in tree if isinstance(node, ast.ImportFrom)}
            assert not {one.split(".")[0] for one in names} & {"transformers", "open_clip", "timm", "PIL"}, name
