"""Docstrings as Sphinx wants them: backticks, tables, types, the comments of fields, the stub of compiled code."""

from __future__ import annotations

import ast
import importlib.resources
import inspect
import re
from typing import Any, TypeAlias

from sphinx.ext.napoleon.docstring import GoogleDocstring

NATIVE = "wdmoe.solver._native"  # compiled: its docstrings and types stand in a stub
Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_docstring(app: Any, what: Any, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx' event `autodoc-process-docstring`: change `lines` in place."""
    native = getattr(obj, "__module__", "") == NATIVE
    source = _source(obj, native)
    node = _definition(source, getattr(obj, "__qualname__", ""))
    if native and node is not None:
        lines[:] = GoogleDocstring(ast.get_docstring(node) or "", app.config, app, what, name, obj).lines()
    _mark(lines)
    if isinstance(node, ast.ClassDef):
        _add_fields(lines, _fields(node, source))
    elif node is not None:
        _add_types(lines, node)


def skip_field(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Sphinx' event `autodoc-skip-member`: fields stand in the text of their class already."""
    return True if what == "class" and not (inspect.isroutine(obj) or isinstance(obj, property)) else None


def _source(obj: Any, native: bool) -> str:
    if native:
        return importlib.resources.files("wdmoe.solver").joinpath("_native.pyi").read_text(encoding="utf-8")
    if not (inspect.isclass(obj) or inspect.isfunction(obj)):
        return ""
    module = inspect.getmodule(obj)
    return inspect.getsource(module) if module is not None else ""


def _definition(source: str, qualified: str) -> Definition | None:
    found: Any = ast.parse(source)
    for part in qualified.split("."):
        inner = (node for node in getattr(found, "body", ()) if isinstance(node, Definition))
        found = next((node for node in inner if node.name == part), None)
    return found if isinstance(found, Definition) else None


def _fields(node: ast.ClassDef, source: str) -> dict[str, tuple[str, str]]:
    """Type and comment of each field. The comment is the field's contract: shape, unit, meaning."""
    found = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            name, kind = ast.unparse(field.target), _type(field.annotation)
            comment = source.splitlines()[(field.end_lineno or 1) - 1].partition("  # ")[2]
            found[name] = (kind, comment)
        elif isinstance(field, ast.FunctionDef) and field.decorator_list and field.returns and len(field.body) == 1:
            found[field.name] = (_type(field.returns), ast.get_docstring(field) or "")  # a property in the stub
    return {name: field for name, field in found.items() if not name.startswith("_")}


def _add_fields(lines: list[str], fields: dict[str, tuple[str, str]]) -> None:
    lines.append("")
    for name, (kind, comment) in fields.items():
        if _states(lines, name):
            lines.append(f":type {name}: {kind}")
        else:
            lines += [f":ivar {name}: {_marked(comment)}", f":vartype {name}: {kind}"]


def _add_types(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    lines.append("")
    given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    lines += [f":type {arg.arg}: {_type(arg.annotation)}" for arg in given if arg.annotation]
    if node.returns is not None and _type(node.returns) != "None":
        lines.append(f":rtype: {_type(node.returns)}")


def _type(annotation: ast.expr) -> str:
    return re.sub(r"_\b", r"\_", ast.unparse(annotation))  # np.bool_ would be a link


def _states(lines: list[str], name: str) -> bool:
    return any(line.startswith(f":param {name}:") for line in lines)


def _mark(lines: list[str]) -> None:
    """Docstrings are plain text with one backtick around code, and tables in an indented block."""
    block = False
    for number, line in enumerate(lines):
        block = line.startswith("    ") or not line if block else False
        if not block:
            block = line.endswith(":") and "\n".join(lines[number + 1 : number + 3]).startswith("\n    ")
            lines[number] = _marked(line) + (":" if block else "")


def _marked(line: str) -> str:
    words = re.split(r"`+([^`]+)`+", line)  # every second one is code
    words[::2] = [re.sub(r"([*|])", r"\\\1", word) for word in words[::2]]
    words[1::2] = [f"``{word}``" for word in words[1::2]]
    return "".join(words)
