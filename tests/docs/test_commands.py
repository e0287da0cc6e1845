"""Commands, flags, paths and names that the pages mention: they exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import tomllib

from tests.docs.pages import PAGES, ROOT, blocks, name_of, spans
from wdmoe.cli.main import cli

SHELL = re.compile(r"\s(?:\||\|\||&&|>|>>|2>|;)(?:\s|$)|&$")
PATH = re.compile(r"(?:tools|docs|tests|native|examples|wdmoe)/[\w./*-]*[\w*]")
FOREIGN_FLAGS = {
    # of pip, apt, curl, git, torchrun and others
    "--no-deps", "--no-build-isolation", "--system", "--home", "--shell", "--now", "--nproc-per-node", "--uninstall",
}  # fmt: skip


def _ours(command: str) -> Iterator[list[str]]:
    """The `wdmoe-node` and `tools/` commands of a line, without variables in front, cut off at shell operators."""
    for part in SHELL.split(command):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*|nice|sudo|\$", words[0]):
            words = words[1:]
        if words and (words[0] == "wdmoe-node" or words[0].startswith("tools/")):
            yield words


def _all_commands() -> Iterator[tuple[str, list[str]]]:
    for block in blocks("bash"):
        for command in block.commands():
            yield from ((str(block), words) for words in _ours(command))
    for name, command in _commands(cli, ""):
        for line in (command.help or "").splitlines():
            if line.strip().startswith("wdmoe-node "):
                yield from ((f"{name} --help", words) for words in _ours(line.strip()))


def _named_in_text() -> Iterator[tuple[str, list[str]]]:
    """Commands in code spans, whose values may be placeholders."""
    for page in PAGES:
        for span in spans(page):
            if span.startswith(("wdmoe-node ", "tools/")):
                yield from ((name_of(page), words) for words in _ours(span.replace("'", "")))


def _commands(group: click.Command, above: str) -> Iterator[tuple[str, click.Command]]:
    name = f"{above} {group.name}".strip()
    yield name, group
    for each in getattr(group, "commands", {}).values():
        yield from _commands(each, name)


def _parse(words: list[str]) -> None:
    """Let click read a command line up to where it would run. Raises click.UsageError."""
    command: click.Command = cli
    context = command.make_context("wdmoe-node", list(words))
    while isinstance(command, click.Group) and context._protected_args:
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command, context = found, found.make_context(name, rest, parent=context)


def test_wdmoe_node_commands_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("token.txt", "key.txt"):
        (tmp_path / name).write_text("wdmoe1.abc")
    wrong = []
    for where, words in _all_commands():
        if words[0] == "wdmoe-node" and "--help" not in words:
            try:
                _parse(words[1:])
            except click.ClickException as error:
                wrong.append(f"{where}: {shlex.join(words)}: {error.format_message()}")
    assert not wrong, "\n".join(wrong)


def test_commands_in_text_exist():
    """Their names and flags; values may be placeholders."""
    known = dict(_commands(cli, ""))
    wrong = []
    for where, words in _named_in_text():
        names = [word for word in words[1:3] if not word.startswith("-")]
        command = known.get(f"cli {' '.join(names)}") or known.get(f"cli {names[0] if names else ''}".strip())
        if words[0] == "wdmoe-node":
            flags = [word.partition("=")[0] for word in words if word.startswith("--")]
            have = [option for param in (command or cli).params for option in _names(param)] + ["--help", "--version"]
            wrong += [f"{where}: {shlex.join(words)}"] if command is None or set(flags) - set(have) else []
    assert not wrong, "\n".join(wrong)


def test_flags_of_tools_are_known():
    """Read from their sources: to start thirty programs for their --help would take minutes."""
    wrong = []
    for where, words in (*_all_commands(), *_named_in_text()):
        file = ROOT / words[0]
        if words[0].startswith("tools/") and file.is_file():
            source = "".join(each.read_text(encoding="utf-8") for each in (file, *file.parent.glob("*lab.py")))
            flags = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
            wrong += [f"{where}: {words[0]} {flag}" for flag in flags if flag not in source]
    assert not wrong, "\n".join(wrong)


def test_flags_in_text_exist():
    """`--flag` in a sentence or a table is a flag of some command of ours."""
    known = {option for _, command in _commands(cli, "") for param in command.params for option in _names(param)}
    for tool in (ROOT / "tools").rglob("*"):
        if tool.is_file() and tool.suffix != ".pyc":
            known |= set(re.findall(r"--[a-z][a-z-]+", tool.read_text(encoding="utf-8")))
    said = {(name_of(page), flag) for page in PAGES for span in spans(page) for flag in _flags(span)}
    assert sorted((page, flag) for page, flag in said if flag not in known | FOREIGN_FLAGS) == []


def _names(param: click.Parameter) -> list[str]:
    return [*param.opts, *param.secondary_opts, "--help", "--version"]


def _flags(span: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)


def test_paths_exist():
    """Of code spans and shell blocks: files of this repository, and packages or modules by their dotted names."""
    wrong = []
    for page in PAGES:
        said = [*spans(page), *(block.text for block in blocks("bash") if block.page == name_of(page))]
        for path in (found for span in said for found in PATH.findall(f" {span}") if f" {span}".find(f"/{found}") < 0):
            wrong += [] if any(ROOT.glob(path)) else [f"{name_of(page)}: {path}"]
        for dotted in (found for span in said for found in re.findall(r"\bwdmoe(?:\.\w+)+", span)):
            wrong += [] if _exists(dotted) else [f"{name_of(page)}: {dotted}"]
    assert not wrong, "\n".join(wrong)


def _exists(dotted: str) -> bool:
    """Whether a module is there, or a name in one; `wdmoe` alone is also a key of answers and of config.json."""
    parts = dotted.split(".")
    for length in range(len(parts), 1, -1):
        base = ROOT.joinpath(*parts[:length])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.exists():
                rest = parts[length:]
                return (
                    not rest
                    or re.search(rf"^(?:def|class) {rest[0]}\b|\b{rest[0]}\b", file.read_text(), re.M) is not None
                )
    return len(parts) == 2 and parts[1] in {"rank", "gate_temperature", "on_drop"}


def test_paths_in_help_and_messages_exist():
    """A message that sends people to a tool or a page sends them to one that is there."""
    sources = [*(ROOT / "wdmoe").rglob("*.py"), *(ROOT / "wdmoe").rglob("*.py*"), *(ROOT / "tools").rglob("*")]
    wrong = set()
    for source in sources:
        if source.is_file() and source.suffix not in {".so", ".pyc", ".sha256"}:
            for path in re.findall(r"(?<![\w./-])(?:tools|docs)/[\w./-]*\w", source.read_text(encoding="utf-8")):
                if not (ROOT / path).exists():
                    wrong.add(f"{name_of(source)}: {path}")
    assert not wrong, "\n".join(sorted(wrong))


def test_extras_that_pip_installs_exist():
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    said = {
        extra
        for block in blocks("bash")
        for found in re.findall(r"(?:wdmoe|\.)\[([a-z,]+)\]", block.text)
        for extra in found.split(",")
    }
    assert said <= known
    assert {"bs", "device"} <= said
