"""Imports, read from the source: who may know whom, and what may not stand in `wdmoe/` at all."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "errors": 0,
    "units": 0,
    "config": 1,
    "receipt": 1,
    "records": 1,
    "results": 1,
    "solver": 2,
    "transport": 2,
    "wireless": 2,
    "backbone": 3,
    "broadcast": 3,
    "moe": 3,
    "nodes": 4,
    "serving": 4,
    "simulation": 4,
    "cli": 5,
    "__main__": 6,
}
FACES = {"wdmoe.broadcast", "wdmoe.solver"}  # hand public names on to programs outside
# How one expert is computed is a chain of its own: the runner opens models through providers.
WITHIN_MOE = {("expert", "providers"), ("providers", "expert")}
LIGHT = ("wdmoe.moe.expert", "wdmoe.nodes.device.device", "wdmoe.transport.")  # run on boards without torch
HEAVY = {"torch", "transformers", "accelerate", "safetensors"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {_name(path): path for path in sorted((ROOT / "wdmoe").rglob("*.py"))}

NATIVE = {_name(path) for path in (ROOT / "wdmoe").rglob("*.pyx")}


@functools.cache
def _tree(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def _imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Full names of imported modules or names, and whether only a type checker runs the import."""
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in typing_only


def _module_of(imported: str) -> str:
    """The module that an imported name lives in."""
    while imported not in SOURCES and imported not in NATIVE and "." in imported:
        imported = imported.rpartition(".")[0]
    return imported


def _inside(name: str) -> list[tuple[str, str]]:
    """(imported name, its module) of a module's imports from the project."""
    return [(each, _module_of(each)) for each, _ in _imports(_tree(name)) if each.split(".")[0] == "wdmoe"]


def _package(module: str) -> str:
    """The part of the tree that has a digit."""
    return module.split(".")[1]


def test_every_package_has_its_digit():
    assert {_package(name) for name in SOURCES if name != "wdmoe"} <= LAYERS.keys()


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "wdmoe"])
def test_imports_go_to_a_smaller_digit_or_stay_inside(name):
    own = _package(name)
    for imported, module in _inside(name):
        other = _package(module)
        # The few modules beside the packages are one package: the root's own.
        same = own == other or (LAYERS[own] == LAYERS[other] <= 1)
        assert same or LAYERS[other] < LAYERS[own], f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("wdmoe.moe.")])
def test_inside_moe_only_the_spine_imports_its_siblings(name):
    own = name.rpartition(".")[2]
    if own == "layer":
        return
    for imported, module in _inside(name):
        if module.startswith("wdmoe.moe."):
            assert (own, module.rpartition(".")[2]) in WITHIN_MOE, f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name, path in SOURCES.items() if path.name == "__init__.py"])
def test_an_init_is_empty_or_hands_names_on(name):
    body = _tree(name).body
    if name not in FACES:
        assert body == []
        return
    for node in body:
        handing_on = isinstance(node, ast.ImportFrom) or (
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        assert handing_on or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_inside_imports_through_a_face(name):
    for imported, module in _inside(name):
        assert module not in FACES, f"{name} imports {imported}: name the module it lives in"


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_that_runs_foreign_bytes_and_no_assert(name):
    tree = _tree(name)
    for imported, _ in _imports(tree):
        # joblib moves its work between processes of one owner as pickles; nothing of a peer gets there.
        ours = name == "wdmoe.simulation.study" and imported.split(".")[0] == "joblib"
        assert ours or imported.split(".")[0] not in FORBIDDEN_MODULES, f"{name} imports {imported}"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"{name}:{node.lineno} asserts; raise an error of ours"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{name}:{node.lineno} calls {node.func.id}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}:{node.lineno} is a bare except"


def _reached(name: str) -> dict[str, str]:
    """Top-level packages that importing a module loads -> the module that imports them."""
    seen, found, todo = set(), {}, [name]
    while todo:
        module = todo.pop()
        if module in seen or module not in SOURCES:
            continue
        seen.add(module)
        at_import = ast.Module([n for n in _tree(module).body if not _is_function(n)], [])
        for imported, typing_only in _imports(at_import):
            if typing_only:
                continue
            if imported.startswith("wdmoe"):
                todo.append(_module_of(imported))
            else:
                found.setdefault(imported.split(".")[0], module)
    return found


def _is_function(node: ast.stmt) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


@pytest.mark.parametrize("name", [name for name in SOURCES if f"{name}.".startswith(LIGHT)])
def test_a_board_needs_no_torch(name):
    reached = _reached(name)
    heavy = {package: module for package, module in reached.items() if package in HEAVY}
    assert not heavy


def test_native_code_never_includes_python():
    for path in (ROOT / "native").rglob("*.[hc]pp"):
        assert "Python.h" not in path.read_text(encoding="utf-8"), path
