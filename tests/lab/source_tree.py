"""The Python sources below a folder as a graph of imports, read without importing any of them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name as one statement of a module asks for it."""

    by: str  # the module with the statement
    line: int
    name: str  # as written: of a module, or of what a module holds
    module: str  # the module of the project that `name` lives in; `name` itself where it is none of the project's
    at_import: bool  # false inside functions, and where only a type checker looks

    def __str__(self) -> str:
        return f"{self.by}:{self.line} imports {self.name}"


@dataclass(frozen=True)
class Sources:
    """All modules of the package `package` that stands in the folder `root`."""

    root: Path
    package: str = "wdmoe"
    _found: dict[str, list[Import]] = field(default_factory=dict)

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Module -> file, `a.b` for `a/b/__init__.py`."""
        return {self._name(path): path for path in sorted((self.root / self.package).rglob("*.py"))}

    @cached_property
    def _known(self) -> set[str]:
        return self.paths.keys() | {self._name(path) for path in (self.root / self.package).rglob("*.pyx")}

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.paths.items()}

    def imports(self, name: str) -> list[Import]:
        """Everything that a module imports, anywhere in it."""
        if name not in self._found:
            self._found[name] = list(self._imports(name, self.trees[name], True))
        return self._found[name]

    def inside(self, name: str) -> list[Import]:
        """What a module imports from the project itself."""
        return [each for each in self.imports(name) if self.is_ours(each.module)]

    def is_ours(self, module: str) -> bool:
        return module == self.package or module.startswith(f"{self.package}.")

    def _name(self, path: Path) -> str:
        return ".".join(path.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")

    def _module_of(self, imported: str) -> str:
        module = imported
        while module not in self._known and "." in module:
            module = module.rpartition(".")[0]
        return module if module in self._known else imported

    def _imports(self, by: str, node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for imported in _names(child):
                yield Import(by, child.lineno, imported, self._module_of(imported), at_import)  # type: ignore[attr-defined]
            yield from self._imports(by, child, at_import and not _runs_later(child))


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that all lead to one another, of two nodes or more (Tarjan's strong components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = _pop_through(stack, node)
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def _pop_through(stack: list[str], last: str) -> list[str]:
    group: list[str] = []
    while not group or group[-1] != last:
        group.append(stack.pop())
    return group


def reached(sources: Sources, name: str, wanted: Callable[[str], bool]) -> dict[str, str]:
    """Foreign packages that importing a module loads and that are `wanted` -> the statement that loads them."""
    seen: set[str] = set()
    found: dict[str, str] = {}
    todo = [name]
    while todo:
        module = todo.pop()
        if module in seen or module not in sources.paths:
            continue
        seen.add(module)
        for each in sources.imports(module):
            if not each.at_import:
                continue
            if sources.is_ours(each.module):
                todo.append(each.module)
            elif wanted(each.module.split(".")[0]):
                found.setdefault(each.module.split(".")[0], str(each))
    return found
