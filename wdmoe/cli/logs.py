"""Log lines on standard error; standard output belongs to results."""

from __future__ import annotations

import logging

import click


def configure_logging(*, verbose: int, quiet: bool) -> None:
    """Warnings by default, more with each `-v`, only errors with `-q`."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S")
    if verbose < 2:
        for chatty in ("uvicorn", "asyncio"):
            logging.getLogger(chatty).setLevel(max(level, logging.WARNING))


def tell_events() -> None:
    """For programs that run on: say who joins and what is served even without `-v`, unless `-q` was given."""
    if not click.get_current_context().find_root().params["quiet"]:
        ours = logging.getLogger("wdmoe")
        ours.setLevel(min(logging.INFO, ours.getEffectiveLevel()))
