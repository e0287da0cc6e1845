"""The export's bar, on a terminal and in a pipe."""

import io

import pytest
from rich.console import Console

from wdmoe.backbone.export_progress import ExportBar


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_names_what_is_done(terminal):
    text = io.StringIO()
    with ExportBar(Console(file=text, force_terminal=terminal, width=100)) as bar:
        bar.start(1000)
        bar.advance(250, "layer 3")
        bar.advance(750, "layer 4")
    assert "layer 4" in text.getvalue()
    if not terminal:
        assert text.getvalue().splitlines() == ["layer 3: 25 % done", "layer 4: 100 % done"]
