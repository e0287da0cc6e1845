"""The bridge from broadcast to experts: one scenario at several SNRs, and its tool from flags to a folder."""

from __future__ import annotations

import csv
import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.lab.families import save_tiny
from wdmoe.backbone.record_trace import record_trace
from wdmoe.errors import ConfigError
from wdmoe.simulation.reports.snr_sweep import at_mean_snr, hears_no_noise, mean_snr_db
from wdmoe.simulation.results import verify_results
from wdmoe.simulation.scenario_file import load_scenario, parse_scenario

WINDOW = 32
TEXT = "".join(chr(97 + i * i % 23) for i in range(200))


def test_the_mean_snr_is_what_was_asked_for() -> None:
    scenario = replace(load_scenario("bridge"), draws=20, seed=7)
    for level in (0.0, 12.5, 30.0):
        moved = at_mean_snr(scenario, level)
        assert mean_snr_db(moved) == pytest.approx(level, abs=0.006)
        assert (moved.seed, moved.draws, moved.variants) == (7, 20, scenario.variants)
        unmoved = replace(moved, radio=scenario.radio, source=scenario.source)
        assert unmoved == scenario  # nothing else changed
    with pytest.raises(ConfigError, match="one line station_power"):
        at_mean_snr(replace(scenario, source=scenario.source.replace("station_power", "#")), 10.0)


def test_what_is_measured_once_hears_nothing_of_the_snr() -> None:
    bridge = load_scenario("bridge").variants
    assert [hears_no_noise(each) for each in bridge] == [True] * 8 + [False] * 6
    journal = {each.name: hears_no_noise(each) for each in load_scenario("journal").variants}
    assert journal == {name: name in ("top-k, equal bandwidth, 16 bit", "+ bandwidth") for name in journal}
    light = {"max_distortion": 0.02, "coarse_bits": 4, "partial_sums": True}
    for lever, value in light.items():
        levers = replace(bridge[0].policy.levers, **{lever: value})
        assert not hears_no_noise(replace(bridge[0], policy=replace(bridge[0].policy, levers=levers)))


def test_the_tool_from_flags_to_a_folder(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "tiny")
    text, trace = tmp_path / "text.txt", tmp_path / "trace.npz"
    text.write_text(TEXT)
    record_trace(model, (text,), WINDOW, WINDOW, False, lambda *_: None).save(trace)
    source = load_scenario("bridge").source
    for old, new in (('"default"', f'"{trace}"'), ("tokens = 128", f"tokens = {WINDOW}"), ("draws = 50", "draws = 2")):
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "mine.toml").write_text(source)
    out = tmp_path / "out"
    flags = [tmp_path / "mine.toml", "--out", out, "--snr", "5,40", "--model", model, "--text", text]
    monkeypatch.setattr(
        "sys.argv", ["snr_sweep", *map(str, flags), "--tokens", "64", "--window", str(WINDOW), "--workers", "1"]
    )
    runpy.run_path(str(repository / "tools" / "study" / "snr_sweep"), run_name="__main__")

    rows = list(csv.DictReader((out / "bridge.csv").read_text().splitlines()))
    variants = parse_scenario(source).variants
    assert [(float(row["snr_db"]), row["variant"]) for row in rows] == [
        (level, each.name) for level in (5.0, 40.0) for each in variants
    ]
    low, high = rows[: len(variants)], rows[len(variants) :]
    for weak, strong, variant in zip(low, high, variants, strict=True):
        if hears_no_noise(variant):
            assert weak["perplexity"] == strong["perplexity"]
        elif float(weak["cast_share"]) > 0.9:  # else mostly bits, which are more exact where they are no slower
            assert float(strong["distortion_db"]) < float(weak["distortion_db"])
        assert float(strong["latency_s"]) < float(weak["latency_s"])
    assert {f"bridge.{kind}" for kind in ("csv", "md", "png", "svg")} <= {file.name for file in out.iterdir()}
    for level in ("snr_5", "snr_40"):
        assert verify_results(out / level, workers=1)[1] == 2
    kept = [json.loads((out / level / "quality.json").read_text()) for level in ("snr_5", "snr_40")]
    assert kept[0]["nats_of_windows"][:8] == kept[1]["nats_of_windows"][:8]
    assert np.isfinite(kept[1]["nats_of_windows"]).all()
