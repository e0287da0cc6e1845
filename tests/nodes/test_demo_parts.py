"""The demo's arithmetic and pictures, without a process."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console

from wdmoe.config import LinkEmulation, ServingRules
from wdmoe.errors import ConfigError
from wdmoe.nodes.demo.figures import Run, agreement, as_document, figures, percentile
from wdmoe.nodes.demo.links import equal_links, radio_links, unequal_links
from wdmoe.nodes.demo.plan import DemoSettings, RunPlan, plan_runs
from wdmoe.nodes.demo.report import PICTURE_COLUMNS, report, save_picture
from wdmoe.nodes.demo.view import DemoView
from wdmoe.nodes.local.station_client import Token
from wdmoe.receipt import Receipt, StageSeconds


def settings(tmp_path, **changes):
    return DemoSettings(cache=tmp_path, prompt="hello", **changes)


def run(plan, *token_ids):
    tokens = tuple(
        Token(text="x", token_id=token, at_s=10.5 + place / 4, devices=("device-1",), layers=(3,), dropped_weight=0.5)
        for place, token in enumerate(token_ids)
    )
    receipt = Receipt(
        prompt_tokens=2,
        completion_tokens=len(tokens),
        bytes_down=700,
        bytes_up=70,
        elapsed_s=1.5,
        stages=StageSeconds(bs_compute=1.0, wait=0.5),
    )
    return Run(plan=plan, asked_s=10.0, tokens=tokens, text="x", reason="length", receipt=receipt, experts={})


def drawn(what, width=100):
    file = io.StringIO()
    Console(file=file, width=width).print(what)
    return file.getvalue()


def test_unequal_links_are_a_row_that_the_seed_deals_out():
    links = unequal_links(8, (), seed=1)
    rates = sorted(link.downlink_bps for link in links)
    assert rates[0] == pytest.approx(20e6)
    assert rates[-1] == pytest.approx(200e6)
    steps = [after / before for before, after in itertools.pairwise(rates)]
    assert steps == pytest.approx([10 ** (1 / 7)] * 7)
    assert links == unequal_links(8, (), seed=1)
    assert {tuple(unequal_links(8, (), seed)) for seed in range(5)} != {links}


def test_stated_links_are_taken_as_they_stand():
    assert [link.uplink_bps for link in unequal_links(3, (5e6, 1e6, 3e6), seed=0)] == [5e6, 1e6, 3e6]
    assert unequal_links(3, (0.0,), seed=0) == (LinkEmulation(),) * 3
    assert [link.uplink_bps for link in unequal_links(1, (8e6, 1e6), seed=0)] == [8e6]


@pytest.mark.parametrize("rates", [(1.0, 2.0, 3.0), (0.0, 1e6)])
def test_links_that_do_not_fit(rates):
    with pytest.raises(ConfigError, match="links"):
        unequal_links(8, rates, seed=0)


def test_equal_links_have_the_same_total():
    links = unequal_links(8, (), seed=0)
    equal = equal_links(links)
    assert len(set(equal)) == 1
    assert 8 * equal[0].uplink_bps == pytest.approx(sum(link.uplink_bps for link in links))


def test_runs_tell_policy_and_links_apart(tmp_path):
    assert [plan.name for plan in plan_runs(settings(tmp_path))] == [
        "cosine, unequal links",
        "topk, unequal links",
        "topk, equal links",
    ]
    assert [plan.name for plan in plan_runs(settings(tmp_path, policy="topk"))] == [
        "topk, unequal links",
        "topk, equal links",
    ]
    assert len(plan_runs(settings(tmp_path, compare=False))) == 1
    assert len(plan_runs(settings(tmp_path, policy="topk", rates_bps=(1e6,)))) == 1


def test_radio_links_are_a_row_over_30_db():
    links = radio_links(8, seed=1)
    for name, strongest_hz in (("downlink_snr_hz", 20e6 * 10**2.8), ("uplink_snr_hz", 20e6 * 10**1.8)):
        row = sorted(getattr(link, name) for link in links)
        assert (row[0], row[-1]) == (pytest.approx(strongest_hz / 1000), pytest.approx(strongest_hz))
    weaker = radio_links(8, seed=1, strongest_snr_hz=1e9, spread=10.0)
    assert sorted(link.downlink_snr_hz for link in weaker)[0] == pytest.approx(1e8)
    assert links == radio_links(8, seed=1)
    assert {radio_links(8, seed) for seed in range(5)} != {links}
    assert len(radio_links(1, seed=0)) == 1


def test_runs_in_a_shared_band_tell_policy_and_bandwidth_apart(tmp_path):
    plans = plan_runs(settings(tmp_path, policy="budget", budget_s=0.1, bandwidth_hz=20e6))
    assert [plan.name for plan in plans] == [
        "budget, optimal bandwidth",
        "topk, optimal bandwidth",
        "topk, equal bandwidth",
    ]
    assert len({plan.radio for plan in plans}) == 1  # so that one station and its devices serve them all
    assert plans[0].decides_as != plans[1].decides_as == plans[2].decides_as
    names = [plan.name for plan in plan_runs(settings(tmp_path, policy="topk", bandwidth_hz=20e6))]
    assert names == ["topk, optimal bandwidth", "topk, equal bandwidth"]
    document = as_document("m", "p", 0, [run(plans[2], 1, 2)])
    assert (document["runs"][0]["bandwidth_hz"], document["runs"][0]["allocation"]) == (20e6, "equal")
    assert document["runs"][0]["devices"][0]["downlink_snr_hz"] == plans[2].links[0].downlink_snr_hz
    assert "SNR 28 dB" in drawn(DemoView("m", "p", plans[0], "1 of 3"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"devices": 0},
        {"tokens": 0},
        {"policy": "luck"},
        {"prompt": " "},
        {"rates_bps": (1.0,) * 3},
        {"bandwidth_hz": -1.0},
        {"bandwidth_hz": 1e6, "rates_bps": (1e6,)},
        {"budget_s": 0.1},
        {"max_dropped": 0.1},
        {"max_dropped": 1.5, "policy": "budget"},
    ],
)
def test_settings_are_checked(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).removesuffix("s_bps").split("_")[0]):
        DemoSettings(**{"cache": tmp_path, "prompt": "x", **wrong})


def test_figures_of_a_run(tmp_path):
    found = figures(run(plan_runs(settings(tmp_path))[0], 1, 2, 3, 4, 5, 6))
    assert found.tokens_per_s == pytest.approx(4.0)
    assert found.first_token_s == pytest.approx(0.5)
    assert found.token_latency_p95_s == pytest.approx(0.25)
    assert found.bytes_down_per_token == pytest.approx(100)  # 2 of the prompt, 6 of the answer, the last never fed


def test_a_single_token_has_no_rate(tmp_path):
    only = run(plan_runs(settings(tmp_path))[0], 1)
    assert figures(only).tokens_per_s is None
    assert "-" in drawn(report([only]))


def test_percentiles():
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 95), percentile([], 50)) == (50, 95, None)
    assert percentile([7.0], 95) == 7


def test_agreement_counts_places(tmp_path):
    plans = plan_runs(settings(tmp_path))
    found = agreement(run(plans[0], 1, 2, 3, 4), run(plans[1], 1, 2, 9, 4))
    assert (found.equal, found.same_start, found.of) == (3, 2, 4)
    assert agreement(run(plans[0], 1), run(plans[1], 1)).same_start == 1


def test_the_document_counts_work_by_device(tmp_path):
    document = as_document("m", "p", 0, [run(plan_runs(settings(tmp_path, devices=2))[0], 1, 2)])
    assert [device["layers_served"] for device in document["runs"][0]["devices"]] == [6, 0]
    assert document["agreement"] == []


@pytest.mark.parametrize("width", [40, 100])
def test_the_view_fits_and_steers_no_terminal(width):
    plan = RunPlan(rules=ServingRules(), equal=True, links=unequal_links(3, (0.0,), seed=0))
    view = DemoView("model [red]", "say \x1b[2J", plan, "1 of 1")
    view.starting("waiting")
    assert "waiting" in drawn(view, width)
    view.streaming({"device-1": 4})
    view.token(
        Token(text="\x1b]0;title\x07 one\n", token_id=1, at_s=1.0, devices=("device-1",), layers=(2,), dropped_weight=0)
    )
    text = drawn(view, width)
    assert "one" in text
    assert "● device-1" in text
    assert "○ device-2" in text
    assert not any(character in text for character in "\x1b\x07")
    assert all(len(line) <= width for line in text.splitlines())


def test_a_picture_is_as_wide_in_any_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = "x" * PICTURE_COLUMNS
    for terminal in ("dumb", "xterm-256color"):
        monkeypatch.setenv("TERM", terminal)
        save_picture(tmp_path / "demo.svg", [line], "title")
        assert line in (tmp_path / "demo.svg").read_text()
