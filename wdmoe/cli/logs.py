"""Log lines on standard error; standard output belongs to results."""

from __future__ import annotations

import logging
from typing import Any

import click

_FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging(*, verbose: int, quiet: bool) -> None:
    """Warnings by default, more with each `-v`, only errors with `-q`."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format=_FORM, datefmt="%H:%M:%S")
    if verbose < 2:
        for chatty in ("uvicorn", "asyncio"):
            logging.getLogger(chatty).setLevel(max(level, logging.WARNING))


def log_setup() -> dict[str, Any]:
    """What another process needs to log as this one does."""
    levels = {name: logging.getLogger(name).level for name in ("", "wdmoe", "uvicorn", "asyncio")}
    return {"form": _FORM, "levels": levels}


def tell_events() -> None:
    """For programs that run on: say who joins and what is served even without `-v`, unless `-q` was given."""
    if not click.get_current_context().find_root().params["quiet"]:
        ours = logging.getLogger("wdmoe")
        ours.setLevel(min(logging.INFO, ours.getEffectiveLevel()))
