"""How Sphinx makes the site: `tools/docs` runs it over the whole checkout, whose README is the first page."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import read_docstring, skip_field

project = "wdmoe"
author = "the wdmoe maintainers"
release = importlib.metadata.version("wdmoe")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# Pages lie where people read them in the repository, so the links between them work in both places.
root_doc = "README"
include_patterns = ["*.md", "docs/**", "wdmoe/*/data/README.md"]
exclude_patterns = ["docs/theme", "docs/results/bridge/*.md", "docs/results/journal/*.md"]  # bare tables
NAVIGATION = {
    "Guides": ["guide_demo", "guide_device", "guide_http", "guide_split", "guide_radio", "guide_quality"],
    "Simulate and embed": ["simulation", "guide_embedding", "broadcast", "results/README"],
    "How it works": ["design", "solver", "wireless", "default_model", "performance", "faults"],
    "Reference": ["api/index", "wire", "bundle", "families"],
    "Project": ["/CONTRIBUTING", "/SECURITY", "/CHANGELOG", "dependencies"],
}

myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]  # shell transcripts and diagrams are no language

autodoc_typehints = "none"  # docstrings.py adds them as the source spells them, not as NumPy resolves them
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = f"wdmoe {release}"
html_static_path = ["theme"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False


def setup(app: Any) -> None:
    """Hook what Sphinx has no setting for."""
    app.connect("source-read", _add_navigation)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("autodoc-skip-member", skip_field)
    app.connect("build-finished", _add_index)


def _add_navigation(app: Any, page: str, source: list[str]) -> None:
    """The README has no table of contents of its own: GitHub shows it as it is."""
    if page == root_doc:
        source[0] += "".join(_toctree(caption, pages) for caption, pages in NAVIGATION.items())
    elif page == "docs/results/README":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n*/*\n/wdmoe/*/data/README\n```\n"


def _toctree(caption: str, pages: list[str]) -> str:
    names = "\n".join(page if page.startswith("/") else f"/docs/{page}" for page in pages)
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{names}\n```\n"


def _add_index(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        out = Path(app.outdir)
        shutil.copyfile(out / "README.html", out / "index.html")
