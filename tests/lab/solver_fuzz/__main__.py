"""Random calls of every public function of the solver, with values that break things. One case, one seed.

python -m tests.lab.solver_fuzz [--cases N] [--seed S] [--only NAME]

Each case either is refused with a ValueError of one line, or its answer holds what is promised. Anything else is
printed with the seed that shows it again, and the run ends with 1. A crash ends the process: the line before it says
from which case on to look (`--cases 1000 --seed S`).
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np

from tests.lab.solver_fuzz import bandwidth_cases, selection_cases, work_cases
from tests.lab.solver_fuzz.numbers import Given

KINDS: dict[str, tuple[float, Callable[[Given], None]]] = {
    "allocate": (0.32, bandwidth_cases.allocate),
    "allocate_many": (0.1, bandwidth_cases.allocate_many),
    "needed_hz": (0.05, bandwidth_cases.invert),
    "budget": (0.2, selection_cases.budget),
    "prune": (0.09, selection_cases.prune),
    "prune_given": (0.04, selection_cases.prune_given),
    "bottleneck": (0.04, selection_cases.bottleneck),
    "copies": (0.05, selection_cases.copies),
    "substitute": (0.03, selection_cases.substitute),
    "group": (0.03, work_cases.group),
    "combine": (0.03, work_cases.add_up),
    "place": (0.005, work_cases.place),
    "price": (0.005, work_cases.price),
    "rank": (0.01, work_cases.rank),
}
NAMES = tuple(KINDS)
SHARES = np.cumsum([share for share, _ in KINDS.values()])
MOST_SHOWN = 20
HANGS_S = 60  # a thousand cases take a second; the process ends with a traceback where they do not end


def run_case(seed: int, only: str | None = None) -> tuple[str, str | None]:
    """Kind of the case, and what is wrong with it; None: nothing."""
    rng = np.random.default_rng(seed)
    pick = rng.random() * SHARES[-1]
    name = only or NAMES[int(np.searchsorted(SHARES, pick))]
    given = Given(rng)
    try:
        KINDS[name][1](given)
    except ValueError as error:
        text = str(error)
        return name, None if text and "\n" not in text else f"not one line: {text!r}"
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return name, f"{type(error).__name__} at {at.filename.rpartition('/')[2]}:{at.lineno}: {error}"
    return name, "bad input was taken" if given.wrong else None


def run(cases: int, seed: int, only: str | None = None, tell: Callable[[str], None] = print) -> int:
    """How many of the cases `seed`, `seed + 1`, ... broke a promise."""
    warnings.simplefilter("error")
    began, done, findings = time.monotonic(), Counter[str](), 0
    for number in range(seed, seed + cases):
        if (number - seed) % 1000 == 0:
            faulthandler.dump_traceback_later(HANGS_S, exit=True)
            if (number - seed) % 10_000 == 0:
                tell(f"case {number}: {number - seed} of {cases} done in {time.monotonic() - began:.0f} s")
        name, fault = run_case(number, only)
        done[name] += 1
        if fault is not None:
            findings += 1
            if findings <= MOST_SHOWN:
                tell(f"seed {number}, {name}: {fault}")
    faulthandler.cancel_dump_traceback_later()
    kinds = ", ".join(f"{name} {count}" for name, count in done.most_common())
    tell(f"{cases} cases from seed {seed} in {time.monotonic() - began:.0f} s, {findings} findings: {kinds}")
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=20240623)
    parser.add_argument("--only", choices=NAMES)
    options = parser.parse_args()
    sys.exit(1 if run(options.cases, options.seed, options.only, lambda line: print(line, flush=True)) else 0)


if __name__ == "__main__":
    main()
