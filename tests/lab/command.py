"""`wdmoe-node WORDS`: as a process, as people run it, or in this process, where torch is loaded already."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from unittest import mock

from tests.lab.waiting import PATIENCE_S
from wdmoe.cli.main import main

MAIN = "from wdmoe.cli.main import main; main()"
Done = subprocess.CompletedProcess[str]


def run(*words: str, before: str = "", **environment: str) -> Done:
    """Run it as a process of its own. `before` is Python to run first."""
    command = [sys.executable, "-c", f"{textwrap.dedent(before)}\n{MAIN}", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, **environment}
    )


def run_here(*words: str) -> Done:
    """Run it in this process: the same entry point, without the seconds that a process takes to import torch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), _own_logging(), mock.patch("sys.argv", ["wdmoe-node", *words]):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Done(words, code, out.getvalue(), err.getvalue())


def fails(result: Done) -> str:
    """The one line of a stated failure."""
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


@contextmanager
def _own_logging() -> Iterator[None]:
    """Lets a command set up logging as in a process of its own, and takes that back."""
    loggers = [logging.getLogger(name) for name in (None, "wdmoe", "uvicorn", "asyncio")]
    before = [(each, each.level, each.handlers[:]) for each in loggers]
    loggers[0].handlers[:] = []
    try:
        yield
    finally:
        for each, level, handlers in before:
            each.setLevel(level)
            each.handlers[:] = handlers
