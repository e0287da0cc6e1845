"""How many files and connections this process may have open at once."""

from __future__ import annotations

import contextlib
import logging
import resource

log = logging.getLogger(__name__)

ENOUGH = 4096  # two for each connection of three sockets, and HTTP beside them


def raise_descriptor_limit() -> int:
    """Use all that the system allows (the hard limit), and say so where that is little. Returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # a hard limit of "unlimited" is more than some kernels take
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < ENOUGH:
        log.warning(
            "this process may open %d files and connections; %d are better (LimitNOFILE= of its service, ulimit -Hn)",
            limit,
            ENOUGH,
        )
    return limit
