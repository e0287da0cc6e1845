"""The fault catalogue and the soak: their judgement, and a short form of both through the very same machinery."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.waiting import PATIENCE_S
from tools.bench.catalogue.checker import Expected, Truth, judge
from tools.bench.catalogue.plan import Results, make_plan
from tools.bench.catalogue.records import Answer, Bounds, TryRecord
from tools.bench.catalogue.registry import all_faults, chosen
from tools.bench.catalogue.report import markdown
from tools.bench.catalogue.soak.samples import Sample, trends

TRUTH = Truth(ids=(5, 6, 7, 8), text="abcd")
WHOLE = Expected(exact=True, stall_s=1.0)
MAY_FAIL = Expected(completes=False, stall_s=1.0)
PATIENT = [word for name in ("stall_copy_s", "stall_s", "settle_s") for word in ("--bound", f"{name}={PATIENCE_S}")]


def answer(*ids: int, degraded: bool = False, error: str = "", told: bool = True, gap_s: float = 0.1) -> Answer:
    times = [10 + gap_s * (1 + n) for n in range(len(ids))]
    receipt = None if error else {"degraded": degraded}
    return Answer(
        wanted=4,
        streamed=True,
        asked_s=10.0,
        ids=list(ids),
        dropped=[0.5 * degraded] * len(ids),
        times_s=times,
        receipt=receipt,
        error=error,
        told=told,
        tokens=len(ids),
        ended_s=times[-1] + gap_s,
    )


def test_a_right_answer_has_nothing_against_it() -> None:
    verdict = judge(answer(5, 6, 7, 8), TRUTH, WHOLE, 10.0)
    assert (verdict.exact, verdict.wrong, verdict.violations) == (True, False, ())
    assert verdict.pause_s == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("given", "expected", "wrong", "found"),
    [
        (answer(5, 6, 9, 8), MAY_FAIL, True, "S2: token 3 of 4"),
        (answer(5, 6, 9, 8, degraded=True), WHOLE, False, "although a copy"),
        (answer(5, 6, 9, 8, degraded=True), MAY_FAIL, False, ""),
        (answer(5, 6, 7, 8, degraded=True), WHOLE, False, "S2: said to be degraded"),
        (answer(5, 6, 7), MAY_FAIL, False, "S1: the answer broke off"),
        (answer(5, 6, error="no expert"), MAY_FAIL, False, ""),
        (answer(5, 6, error="no expert"), WHOLE, False, "S1: an error after 2 tokens"),
        (answer(5, 6, error="reset", told=False), MAY_FAIL, False, "S1: the answer broke off"),
        (answer(5, 6, 7, 8, gap_s=3.0), WHOLE, False, "S4: a pause of 3.00 s"),
    ],
)
def test_what_is_held_against_an_answer(given: Answer, expected: Expected, wrong: bool, found: str) -> None:
    verdict = judge(given, TRUTH, expected, 10.0)
    assert verdict.wrong == wrong
    assert found in "; ".join(verdict.violations)
    assert bool(verdict.violations) == bool(found)


def test_a_whole_answer_is_compared_by_its_text() -> None:
    whole = Answer(4, False, 10.0, text="abxd", tokens=4, ended_s=11.0, receipt={"degraded": False})
    assert judge(whole, TRUTH, MAY_FAIL, 10.0).wrong
    whole.receipt = {"degraded": False, "suspect": True}
    assert not judge(whole, TRUTH, MAY_FAIL, 10.0).wrong


def test_every_fault_is_there_and_every_try_has_its_own_seed() -> None:
    ids = set(all_faults())
    assert {f"F{n}" for n in range(1, 21)} <= ids
    assert {f"I{n}" for n in range(1, 14)} <= ids
    plan = make_plan(chosen("F1,i8"), tries=3, seed=7)
    assert [each.key for each in plan if each.fault.id == "F1"] == [("F1", n) for n in (0, 1, 4, 5, 2, 3)]
    assert len({each.seed for each in plan}) == len(plan) == 6 + 3
    with pytest.raises(ValueError, match="F99"):
        chosen("F1,F99")
    with pytest.raises(ValueError, match="stall"):
        Bounds().with_words(("speed=1",))


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "tries.json"
    results = Results.resume(file, {"seed": 7})
    results.add(TryRecord(fault="F1", number=0, seed="7/F1/0", copies=2, phase="decode", answers=2, exact=2))
    again = Results.resume(file, {"seed": 7})
    assert again.done() == {("F1", 0)}
    assert again.tries == results.tries
    assert "| F1 kill -9 of a device | 1 | 1 | 2 |" in markdown(again.tries)
    with pytest.raises(ValueError, match="seed 7"):
        Results.resume(file, {"seed": 8})


def test_a_slope_is_seen_through_noise() -> None:
    def sample(second: int, growth_mib: float) -> Sample:
        noise = (second * 7919) % 13
        return Sample(float(second), 300 + noise + growth_mib * second / 1000, 50, 20, 2, 0.0, 4, 400.0, 1)

    by_name = {each.name: each for each in trends([sample(n, 100.0) for n in range(1000)])}
    assert not by_name["rss_mib"].flat
    assert by_name["descriptors"].flat
    assert all(each.flat for each in trends([sample(n, 0.0) for n in range(1000)]))


@pytest.mark.slow
def test_a_short_catalogue(repository: Path, tmp_path: Path) -> None:
    """Real processes, real signals. Bounds are wide: what is asked is whether answers are right and all comes back."""
    file = tmp_path / "tries.json"
    words = ["--only", "F1,F2,F17,F19", "--tries", "2", "--json", str(file), *PATIENT]
    done = subprocess.run(
        [sys.executable, str(repository / "tools/bench/faults"), *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tries = json.loads(file.read_text())["tries"]
    assert len(tries) == 2 * 2 * 4
    assert all(each["passed"] and each["answers"] == 2 for each in tries)
    assert any(each["exact"] == 2 for each in tries)


@pytest.mark.slow
def test_a_short_soak(repository: Path, tmp_path: Path) -> None:
    words = ["--minutes", "0.25", "--seed", "3", "--only", "kill,freeze,guest,garbage"]
    words += ["--json", str(tmp_path / "soak.json"), "--plot", str(tmp_path / "soak.png")]
    done = subprocess.run(
        [sys.executable, str(repository / "tools/soak"), *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    result = json.loads((tmp_path / "soak.json").read_text())
    assert (result["answers"]["wrong"], result["answers"]["hung"]) == (0, 0)
    assert result["answers"]["exact"] > 0
    assert result["complaints"] == [], done.stdout
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
