"""Every fault there is, in the order of the table: F1 to F20, then the thirteen that outsiders found."""

from __future__ import annotations

import re

from tools.bench.catalogue.fault import Fault
from tools.bench.catalogue.faults import capacity, commands, files, lies, network, outsiders, processes, versions

_MODULES = (processes, network, files, lies, versions, outsiders, capacity, commands)


def all_faults() -> dict[str, type[Fault]]:
    """By id."""
    found = [fault for module in _MODULES for fault in module.FAULTS]
    return {fault.id: fault for fault in sorted(found, key=lambda fault: _rank(fault.id))}


def chosen(words: str) -> list[type[Fault]]:
    """Those named, as in `F1,F3`; "" names all. Raises ValueError naming the word that is none."""
    known = all_faults()
    if not words:
        return list(known.values())
    ids = [word.strip().capitalize() for word in words.split(",") if word.strip()]
    if unknown := [each for each in ids if each not in known]:
        raise ValueError(f"{', '.join(unknown)}: faults are {', '.join(known)}")
    return [known[each] for each in ids]


def _rank(name: str) -> tuple[str, int, str]:
    return (name[0], int(re.sub(r"\D", "", name)), name)
