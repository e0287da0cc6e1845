"""What the demo says at its end: who won, what it cost, and where the time went. From made-up figures."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from wdmoe.config import ServingRules
from wdmoe.nodes.demo.figures import Run
from wdmoe.nodes.demo.links import radio_links
from wdmoe.nodes.demo.phases import Phases
from wdmoe.nodes.demo.plan import RunPlan
from wdmoe.nodes.demo.quality import WINDOW_TOKENS, WINDOWS, Reading, compare, perplexity, read_all, tokens
from wdmoe.nodes.demo.report import report
from wdmoe.nodes.demo.verdict import verdict
from wdmoe.nodes.local.cluster import WindowReading
from wdmoe.nodes.local.station_client import Token
from wdmoe.receipt import Receipt

BUDGET = ServingRules(policy="budget", max_dropped=0.05)


def reading(nats: float, step: float = 0.0) -> Reading:
    """So many nats a token, more by a step in each window."""
    return tuple(
        WindowReading(nats=64 * (nats + step * number), tokens=64, dropped_weight=0.1) for number in range(WINDOWS)
    )


def run(
    rules: ServingRules, seconds: float, dropped: float = 0.0, read: tuple[WindowReading, ...] | None = None
) -> Run:
    tokens = tuple(
        Token(text="x", token_id=7, at_s=100 + at_s, devices=(), layers=(), dropped_weight=dropped)
        for at_s in (seconds / 2, seconds)
    )
    return Run(
        plan=RunPlan(rules=rules, equal=False, links=radio_links(4, 0), bandwidth_hz=10e6),
        asked_s=100.0,
        tokens=tokens,
        text="xx",
        reason="length",
        receipt=Receipt(prompt_tokens=3, completion_tokens=2, dropped_weight=dropped, elapsed_s=seconds),
        experts={},
        reading=read,
    )


def three(best_s: float, plain_s: float, equal_s: float, dropped: float = 0.06, more_nats: float = 0.01) -> list[Run]:
    plain = reading(3.7)
    return [
        run(BUDGET, best_s, dropped, reading(3.7 + more_nats)),
        run(ServingRules(), plain_s, read=plain),
        run(ServingRules(allocation="equal"), equal_s, read=plain),
    ]


def test_won():
    assert verdict(three(10.0, 13.0, 21.0)) == (
        "'budget, optimal bandwidth' answered in 10 s: 1.30 times as fast as 'topk, optimal bandwidth' (13 s), and "
        "2.10 times as fast as 'topk, equal bandwidth' (21 s). It dropped 6.0% of the gate weight; perplexity +1.0 % "
        "against 'topk, optimal bandwidth' (95 %: +1.0 % to +1.0 %) on 512 tokens of held-out text."
    )


def test_lost_to_both():
    said = verdict(three(10.0, 8.0, 5.0))
    assert "slower, it took 1.25 times as long as 'topk, optimal bandwidth' (8 s), and slower, it took 2.00" in said
    assert "times as fast" not in said


def test_won_and_lost():
    said = verdict(three(10.0, 20.0, 5.0))
    assert "2.00 times as fast as 'topk, optimal bandwidth' (20 s), and slower, it took 2.00 times as long as" in said


def test_alike():
    said = verdict(three(10.0, 10.1, 9.9, dropped=0.0, more_nats=0.0))
    assert ": as fast as 'topk, optimal bandwidth' (10.1 s), and as fast as 'topk, equal bandwidth' (9.9 s)." in said
    assert "It dropped nothing; perplexity +0.0 %" in said


def test_better_text_is_said_to_be_better():
    assert "perplexity -1.0 % against" in verdict(three(10.0, 13.0, 21.0, more_nats=math.log(0.99)))


def test_what_was_not_measured_is_not_said():
    said = verdict([run(BUDGET, 10.0, 0.06), run(ServingRules(), 13.0)])
    assert said.endswith("It dropped 6.0% of the gate weight; what that does to the answers was not measured.")
    assert verdict([run(BUDGET, 10.0)]) == ""


def test_perplexity_and_its_interval():
    plain = reading(3.0)
    assert (perplexity(plain), tokens(plain)) == (pytest.approx(math.exp(3)), 512)
    change = compare(reading(3.0, step=0.01), plain)
    mean, deviation = 0.035, 0.01 * math.sqrt(6)  # of 0 to 7 hundredths
    assert change.ratio == pytest.approx(math.exp(mean))
    assert math.log(change.high) - mean == pytest.approx(2.365 * deviation / math.sqrt(8))
    assert math.log(change.low) - mean == pytest.approx(-2.365 * deviation / math.sqrt(8))


def test_every_window_is_read_once_and_told():
    asked, told = [], []

    def read(window: int, length: int) -> WindowReading:
        asked.append((window, length))
        return WindowReading(nats=1.0, tokens=length - 1, dropped_weight=0.0)

    assert tokens(read_all(read, lambda done, of: told.append((done, of)))) == 512
    assert asked == [(number, WINDOW_TOKENS) for number in range(WINDOWS)]
    assert told == [(number, WINDOWS) for number in range(WINDOWS)]


def test_phases_leave_no_gap():
    now = iter([10.0, 12.0, 15.0, 15.5, 19.0, 20.0])
    phases = Phases(lambda: next(now))
    phases.add("installing", 100.0)
    assert phases.end("the model") == 2.0
    assert phases.end("answer 1") == 3.0
    phases.token()
    phases.end("reading")
    phases.end("reading")
    assert phases.spent_s == {"installing": 100.0, "the model": 2.0, "answer 1": 3.0, "reading": 5.0}
    assert (phases.total_s, phases.first_token_s) == (110.0, 5.5)


def test_the_first_token_alone_is_the_first():
    now = iter([0.0, 4.0, 9.0])
    phases = Phases(lambda: next(now))
    assert phases.first_token_s is None
    phases.token()
    phases.token()
    assert phases.first_token_s == 4.0


def test_the_report_ends_with_the_verdict():
    runs, file = three(10.0, 13.0, 21.0), io.StringIO()
    now = iter([0.0, 30.0, 33.0])
    phases = Phases(lambda: next(now))
    phases.end("the model")
    phases.token()
    Console(file=file, width=120).print(report(runs, phases))
    text = " ".join(file.getvalue().split())
    assert text.endswith(" ".join(verdict(runs).split()))
    assert "perplexity, held-out text 40.85 40.45 40.45" in text
    assert "10 MHz shared by 4 devices, SNR from 1 to 31 dB if one had it all." in text
    assert "tokens as in column 1 2 of 2, first 2 2 of 2, first 2" in text
    assert "First token in sight after 33 s. Where the time went: the model 30 s; in all 30 s." in text
