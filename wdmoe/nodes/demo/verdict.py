"""The last line of the table: in words, what the first run won and what that cost. From measured figures only."""

from __future__ import annotations

from collections.abc import Sequence

from wdmoe.nodes.demo.figures import Run, figures
from wdmoe.nodes.demo.quality import compare
from wdmoe.units import format_quantity

ALIKE = 0.02  # relative difference of two times below which one run says nothing


def verdict(runs: Sequence[Run]) -> str:
    """What the first of these runs won over each other one, and what it cost. "" where there is nothing to compare."""
    if len(runs) < 2:
        return ""
    best, others = runs[0], runs[1:]
    faster = ", and ".join(_against(best, other) for other in others)
    return f"{_quoted(best)} answered in {format_quantity(figures(best).answer_s, 'time')}: {faster}. {_cost(runs)}."


def _against(best: Run, other: Run) -> str:
    took_s, other_s = figures(best).answer_s, figures(other).answer_s
    against = f"{_quoted(other)} ({format_quantity(other_s, 'time')})"
    ratio = other_s / took_s
    if abs(ratio - 1) < ALIKE:
        return f"as fast as {against}"
    if ratio > 1:
        return f"{ratio:.2f} times as fast as {against}"
    return f"slower, it took {1 / ratio:.2f} times as long as {against}"


def _cost(runs: Sequence[Run]) -> str:
    dropped = figures(runs[0]).dropped_weight
    lost = "It dropped nothing" if dropped == 0 else f"It dropped {dropped:.1%} of the gate weight"
    plain = next((run for run in runs[1:] if run.plan.policy == "topk" and run.reading), None)
    if runs[0].reading is None or plain is None or plain.reading is None:
        return f"{lost}; what that does to the answers was not measured"
    change = compare(runs[0].reading, plain.reading)
    return (
        f"{lost}; perplexity {_percent(change.ratio)} against {_quoted(plain)} (95 %: {_percent(change.low)} to "
        f"{_percent(change.high)}) on {change.tokens} tokens of held-out text"
    )


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _quoted(run: Run) -> str:
    return f"'{run.plan.name}'"
