"""What the pages promise about themselves: length, one tree, one word for one thing."""

from __future__ import annotations

import re
import subprocess

from tests.docs.pages import PAGES, ROOT, blocks, name_of, prose
from wdmoe.cli.main import cli

MOST_WORDS = 700
MOST_COLUMNS = 120


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len([word for word in text.split() if re.search(r"\w", word)]) <= MOST_WORDS


def test_design_and_contributing_show_the_same_tree():
    first, second = (b.text for b in blocks("text") if b.text.startswith("wdmoe/\n"))
    assert first == second


def test_the_tree_names_every_package():
    tree = next(block.text for block in blocks("text") if block.text.startswith("wdmoe/\n"))
    named = set(re.findall(r"\b\w+\b", tree))
    packages = {path.parent.name for path in (ROOT / "wdmoe").rglob("__init__.py")}
    modules = {path.stem for path in (ROOT / "wdmoe").glob("*.py")} - {"__init__", "__main__"}
    assert sorted((packages | modules) - named) == []


def test_prose_is_wrapped():
    long = [f"{name_of(page)}:{number}" for page in PAGES for number, line in prose(page) if len(line) > MOST_COLUMNS]
    assert not long, "\n".join(long)


def test_one_word_for_one_thing():
    """The module `replicas.py` and the flag `place --replicas` keep their names; readers see copies and similarity."""
    command = ["git", "grep", "-inE", r"likeness|\bfleet\b|\breplicas of\b", "--", "*.md", "wdmoe/cli"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout == ""


def test_help_names_the_scenarios_that_ship():
    shipped = {file.stem for file in (ROOT / "wdmoe/simulation/data").glob("*.toml")}
    said = set(re.findall(r"[a-z]+(?:-[a-z]+)*", cli.commands["simulate"].help or ""))
    assert shipped <= said
    pages = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/simulation.md"))
    assert set(re.findall(r"wdmoe-node simulate ([a-z-]+)", pages)) <= shipped
