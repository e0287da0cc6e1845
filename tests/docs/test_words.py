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


def test_every_figure_is_filled_in():
    """Pages that a tool fills in have no gap left."""
    assert [name_of(page) for page in PAGES if "{{" in page.read_text(encoding="utf-8")] == []


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
