"""The pages that people read: their code blocks, their code spans, and their prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/api").glob("*.md")),
    ROOT / "docs/results/README.md",  # the others there are made by tools
    *sorted((ROOT / "wdmoe").glob("*/data/README.md")),
]
LANGUAGES = {"bash", "ini", "json", "python", "text", "toml", "{eval-rst}", "{toctree}"}
_FENCE = re.compile(r"^```(\S*)\s*$")
_REASON = re.compile(r"^<!-- not run: (.+) -->$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of code; `reason` says why it does not run, "" where it does."""

    page: str
    line: int  # of its first line of code
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """Shell commands, continued lines joined, comments and prompts left out."""
        joined = self.text.replace("\\\n", " ")
        plain = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines())
        return [line for line in plain if line]


def blocks(*languages: str) -> list[Block]:
    """All blocks of all pages, or those in these languages."""
    found = [block for page in PAGES for block in _blocks(page)]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines outside of blocks, tables and comments."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if _FENCE.match(line):
            inside = not inside
        elif not inside and not line.startswith(("|", "<!--", "![")):
            yield number, line


def spans(page: Path) -> list[str]:
    """What stands between single backticks, tables included."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return str(page.relative_to(ROOT))


def _blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence and start is None:
            start, language = number, fence[1]
            said = _REASON.match(lines[number - 1])
        elif fence and start is not None:
            text = "\n".join(lines[start + 1 : number]) + "\n"
            yield Block(name_of(page), start + 2, language, text, said[1] if said else "")
            start = None
