"""Judges a try by what its clients saw: S1 no token lost, S2 none wrong, S4 bounded. Pure functions.

S3, each expert contributes once to each token, shows in S2: a sum with one too many is another sum.
S5, nothing is left over, is measured by the cluster.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tools.bench.catalogue.records import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What the undivided model says, as ids and as the text that a whole answer of this length has."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a fault may do to an answer."""

    completes: bool = True
    exact: bool = False  # not even degraded
    stall_s: float = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """About one answer."""

    exact: bool
    wrong: bool
    pause_s: float
    violations: tuple[str, ...]


def judge(answer: Answer, truth: Truth, expected: Expected, injected_s: float) -> Verdict:
    """Look at one answer.

    Args:
        answer: a client's, ended or not.
        injected_s: when the fault began, on the clock of the answer's times; infinite: never.
    """
    same = is_exact(answer, truth)
    wrong = not same and not _admits(answer, truth)
    pause_s = longest_pause_s(answer, injected_s)
    found = []
    if not answer.ended_s:
        found.append("S4: the request never ended")
    elif not answer.complete and not (answer.error and answer.told):
        found.append(f"S1: the answer broke off after {len(answer.ids)} tokens: {answer.error or 'no end'}")
    if expected.completes and answer.error and answer.told:
        found.append(f"S1: an error after {len(answer.ids)} tokens: {answer.error[:160]}")
    if wrong:
        found.append(f"S2: {_difference(answer, truth)}, and called right")
    if expected.exact and answer.complete and not same:
        found.append(f"S2: {_difference(answer, truth)}, although a copy was there")
    if expected.exact and answer.complete and same and answer.admits:
        found.append("S2: said to be degraded or suspect, although a copy was there")
    if pause_s > expected.stall_s:
        found.append(f"S4: a pause of {pause_s:.2f} s, bound {expected.stall_s:g} s")
    return Verdict(exact=same and answer.complete, wrong=wrong, pause_s=pause_s, violations=tuple(found))


def is_exact(answer: Answer, truth: Truth) -> bool:
    """Whether all that came is what the undivided model says."""
    if answer.streamed:
        return tuple(answer.ids) == truth.ids[: len(answer.ids)]
    return answer.receipt is None or answer.text == truth.text


def longest_pause_s(answer: Answer, injected_s: float) -> float:
    """Longest time without a token or an end, from the moment of the fault on."""
    marks = [injected_s, *(each for each in answer.times_s if each >= injected_s)]
    if answer.ended_s >= injected_s:
        marks.append(answer.ended_s)
    if not answer.streamed:
        return 0.0
    return max((b - a for a, b in itertools.pairwise(marks)), default=0.0)


def _admits(answer: Answer, truth: Truth) -> bool:
    """It says in its receipt, or where it broke off, in its last tokens, that experts were missing."""
    if answer.receipt is not None or not answer.streamed:
        return answer.admits
    first = next(i for i, (a, b) in enumerate(zip(answer.ids, truth.ids, strict=False)) if a != b)
    return bool(answer.error) or answer.dropped[first] > 0


def _difference(answer: Answer, truth: Truth) -> str:
    if not answer.streamed:
        return "another text"
    pairs: Sequence[tuple[int, int]] = list(zip(answer.ids, truth.ids, strict=False))
    return f"token {next((i for i, (a, b) in enumerate(pairs) if a != b), -1) + 1} of {len(pairs)} is another one"
