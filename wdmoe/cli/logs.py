"""Log lines on standard error; standard output belongs to results."""

from __future__ import annotations

import logging


def configure_logging(*, verbose: int, quiet: bool) -> None:
    """Warnings by default, more with each `-v`, only errors with `-q`."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    if verbose < 2:
        for chatty in ("uvicorn", "asyncio", "httpx"):
            logging.getLogger(chatty).setLevel(max(level, logging.WARNING))
