"""The simulator: same seed same digits anywhere, closed forms, results that a check can trust, and bad scenarios."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from wdmoe.cli.main import cli
from wdmoe.errors import ConfigError
from wdmoe.results.gate_trace import GateTrace
from wdmoe.simulation.results import draws_text, save_results, verify_results
from wdmoe.simulation.scenario import Scenario
from wdmoe.simulation.scenario_file import SHIPPED, find_trace, load_scenario, parse_scenario
from wdmoe.simulation.statistics import mean_and_interval, summarise
from wdmoe.simulation.study import run_study
from wdmoe.wireless.compute import expert_flop
from wdmoe.wireless.pathloss import free_space_db

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
name = "small"
seed = 5
draws = 4
[model]
hidden = 64
inner = 32
tokens = 6
[[variant]]
name = "equal"
bandwidth = "equal"
[[variant]]
name = "best"
[[variant]]
name = "budget"
policy = "budget"
max_dropped = 0.1
multicast = true
bits = 8
"""


@pytest.fixture(scope="module")
def small() -> Scenario:
    return parse_scenario(SMALL)


@pytest.fixture(scope="module")
def results(small: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "small-results"
    save_results(run_study(small, 1), folder)
    return folder


def test_one_and_two_workers_give_the_same_digits(small: Scenario) -> None:
    alone = draws_text(run_study(small, 1))
    assert draws_text(run_study(small, 2)) == alone
    assert draws_text(run_study(small, 1)) == alone
    assert draws_text(run_study(replace(small, backend="threading"), 2)) == alone
    assert draws_text(run_study(replace(small, seed=6), 1)) != alone


def test_a_dask_cluster_gives_the_same_digits(small: Scenario) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        far = run_study(replace(small, backend=f"dask:{cluster.scheduler_address}"))
    assert draws_text(far) == draws_text(run_study(small, 1))


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_digits(small: Scenario) -> None:
    ray = pytest.importorskip("ray")
    far = run_study(replace(small, backend="ray"), 2)
    assert draws_text(far) == draws_text(run_study(small, 1))
    assert not ray.is_initialized()


def test_variants_are_paired_and_more_draws_change_none(small: Scenario) -> None:
    whole = run_study(small, 1)
    alone = run_study(replace(small, variants=small.variants[1:2], draws=6), 1)
    assert (alone.values[:4, 0] == whole.values[:, 1]).all()


def test_levers_and_bandwidth_order_every_draw(small: Scenario) -> None:
    latency = run_study(small, 1).of("latency_s")
    assert (np.diff(latency, axis=1) < 0).all()


def test_layers_that_are_kept_whole_drop_nothing(small: Scenario) -> None:
    part, whole = (
        run_study(replace(small, variants=(replace(small.variants[2], rank="energy", whole_layers=count),)), 1)
        for count in (0, 30)
    )
    assert (part.of("dropped_weight") > 0).all()
    assert (whole.of("dropped_weight") == 0).all()
    np.testing.assert_allclose(whole.of("experts_per_token"), 4)


def test_latency_without_randomness_is_the_formula() -> None:
    """Devices at one distance, no fading, equal bands: each layer waits for the most loaded device."""
    text = """
        name = "still"
        draws = 1
        [channel]
        path_loss = "free-space"
        fading = "none"
        [devices]
        nearest_m = 50.0
        farthest_m = 50.0
        flop_s = 1e9
        [model]
        hidden = 64
        inner = 32
        tokens = 7
        station_time = "1ms"
        [[variant]]
        name = "equal"
        bandwidth = "equal"
    """
    study = run_study(parse_scenario(text), 1)
    trace = GateTrace.load(find_trace("default"))
    start = int(_start_of_first_draw(trace))
    tokens = (start + np.arange(7)) % trace.tokens
    gain = 10 ** (-free_space_db(50.0, 3.5e9) / 10) / (10 ** (-17.4) * 1e-3)
    band = 100e6 / 8
    rate = [band * np.log2(1 + power * gain / band) for power in (10.0, 0.2)]
    token_s = 64 * 16 / rate[0] + 64 * 16 / rate[1] + expert_flop(64, 32) / 1e9
    busiest = [np.bincount(layer[tokens].ravel(), minlength=8).max() for layer in trace.experts]
    assert study.of("latency_s")[0, 0] == pytest.approx(sum(busiest) * token_s + len(busiest) * 1e-3, rel=1e-12)


def _start_of_first_draw(trace: GateTrace) -> int:
    rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(0,)))
    rng.random(8)  # distances
    rng.standard_normal(8)  # shadowing
    return int(rng.integers(trace.tokens, size=1)[0])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scenarios_run(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.draws >= 50
    model = replace(scenario.model, tokens=min(scenario.model.tokens, 32), passes=1)
    study = run_study(replace(scenario, draws=1, model=model), 1)
    assert np.isfinite(study.values).all()
    dropped = study.of("dropped_weight")
    for index, variant in enumerate(scenario.variants):
        assert variant.policy.name != "budget" or dropped[0, index] <= variant.policy.max_dropped + 1e-6


def test_intervals_cover_what_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        mean, half = mean_and_interval(rng.normal(3.0, 2.0, 8))
        hits += abs(mean - 3.0) <= half
    assert 0.935 < hits / 2000 < 0.965
    assert np.isnan(mean_and_interval(np.array([1.0]))[1])
    assert np.isnan(mean_and_interval(np.array([]))[0])


def test_a_draw_in_outage_is_counted_and_left_out_of_means(small: Scenario) -> None:
    study = run_study(small, 1)
    study.values[2, 1, 0] = np.inf
    equal, best, _ = summarise(study)
    assert (equal.outage, best.outage) == (0.0, 0.25)
    assert np.isfinite([best.latency_s, best.saving, best.median_s]).all()


def test_results_are_whole_and_verify(results: Path) -> None:
    names = {file.name for file in results.iterdir()}
    assert {"manifest.json", "scenario.toml", "draws.csv", "summary.csv", "latency.png", "latency.svg"} <= names
    scenario, again = verify_results(results, 1)
    assert (scenario.name, again) == ("small", 4)
    assert verify_results(results, 1, draws=2)[1] == 2
    assert (results / "latency.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("name", "draws"), [("journal", 200), ("bridge/snr_10", 20)])
def test_shipped_results_verify(name: str, draws: int) -> None:
    scenario, again = verify_results(ROOT / "docs" / "results" / name, 1, draws=2)
    assert (scenario.draws, again) == (draws, 2)


def test_figures_are_the_same_on_every_run(small: Scenario, results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "written over")
    (folder / "latency.png").write_bytes(b"old")
    save_results(run_study(small, 1), folder)
    for file in results.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", ["draws.csv", "summary.csv", "scenario.toml", "latency.svg"])
def test_a_tampered_file_is_found(results: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("0", "1", 1))
    with pytest.raises(ConfigError, match=f"{name} was changed"):
        verify_results(folder, 1)


def test_a_figure_whose_hash_was_mended_is_found_by_running_again(results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    lines = (folder / "draws.csv").read_text().splitlines()
    row = lines[3].split(",")
    row[2] = repr(float(row[2]) * 0.99)
    lines[3] = ",".join(row)
    (folder / "draws.csv").write_text("\n".join(lines) + "\n")
    _mend(folder, "draws.csv")
    with pytest.raises(ConfigError, match="line 4"):
        verify_results(folder, 1)


def test_a_summary_whose_hash_was_mended_is_found(results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    text = (folder / "summary.csv").read_text()
    (folder / "summary.csv").write_text(text.replace("equal,0.", "equal,1.", 1))
    _mend(folder, "summary.csv")
    with pytest.raises(ConfigError, match=r"summary\.csv, line 2"):
        verify_results(folder, 1, draws=1)


def test_digits_that_another_processor_may_have_are_accepted(results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    lines = (folder / "draws.csv").read_text().splitlines()
    row = lines[3].split(",")
    row[2] = repr(float(row[2]) * (1 + 1e-14))
    lines[3] = ",".join(row)
    (folder / "draws.csv").write_text("\n".join(lines) + "\n")
    _mend(folder, "draws.csv")
    verify_results(folder, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"../../etc/passwd": "0"}}, "list the files"),
        ({"format": 2}, "format"),
        ({"seed": "many"}, "manifest"),
        ({"trace": "0"}, "trace"),
    ],
)
def test_a_manifest_that_lies_is_refused(results: Path, tmp_path: Path, change: dict, message: str) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text()) | change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=message):
        verify_results(folder, 1)


def _mend(folder: Path, name: str) -> None:
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[model]", "[model]\nspeed = 3", r"\[model\] has no key 'speed'"),
        ("hidden = 64", "", r"\[model\] needs hidden"),
        ("hidden = 64", "hidden = 6.5", "hidden must be an integer"),
        ("hidden = 64", "hidden = true", "hidden must be an integer"),
        ("tokens = 6", "tokens = 100000", "100000 of a trace"),
        ("tokens = 6", 'tokens = 6\ntrace = "nowhere.npz"', "nowhere.npz"),
        ("draws = 4", "draws = 0", "draws must be an integer"),
        ("draws = 4", 'draws = 4\n[radio]\nbandwidth = "10"', "unit is missing"),
        ("draws = 4", 'draws = 4\n[radio]\nbandwidth = "0Hz"', "above 0"),
        ("draws = 4", "draws = 4\n[radio]\nbandwidth = 10", "in quotes"),
        ("draws = 4", 'draws = 4\n[radio]\nlaw = "nr"', "density"),
        ("draws = 4", 'draws = 4\n[channel]\nfading = "nakagami"', "one of rayleigh"),
        ("draws = 4", "draws = 4\n[channel]\nexponent = nan", "finite number"),
        ("draws = 4", "draws = 4\n[devices]\nflop_s = [1.0, 2.0]", "2 numbers for 8 devices"),
        ("draws = 4", "draws = 4\n[devices]\nnearest_m = 300.0", "nearest_m"),
        ("draws = 4", "draws = 4\n[devices]\ncount = 4", "room for 4 of a layer's 8 experts"),
        ("draws = 4", 'draws = 4\nbackend = "spark"', "backend must be"),
        ("draws = 4", "draws = 4\nradio = 3", r"\[radio\] must be a table"),
        ('name = "best"', 'name = "equal"', "same name"),
        ('policy = "budget"', 'policy = "magic"', "policy must be one of"),
        ('policy = "budget"', 'policy = "budget"\nrank = "luck"', "rank must be one of"),
        ("multicast = true", 'multicast = "loud"', "multicast must be true, false or one of none, weakest"),
        (
            "multicast = true\nbits = 8\n",
            'multicast = "superposition"\n[radio]\nlaw = "nr"\nspending = "density"\n',
            "'budget': multicast = \"superposition\" needs",
        ),
        ("bits = 8", "bits = 7", "'budget': bits must be one of"),
        ("bits = 8", "least_similarity = 2.5", "least_similarity"),
        ('name = "small"', 'name = "small', "not TOML"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused_in_one_line(old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(ConfigError, match=message) as caught:
        run_study(parse_scenario(SMALL.replace(old, new, 1)), 1)
    assert "\n" not in str(caught.value)


def test_replacing_needs_similarity_in_the_trace(small: Scenario, tmp_path: Path) -> None:
    trace = replace(GateTrace.load(find_trace("default")), expert_similarity=None)
    trace.save(tmp_path / "plain.npz")
    variant = replace(small.variants[1], policy=replace(small.variants[1].policy, least_similarity=0.5))
    model = replace(small.model, trace=str(tmp_path / "plain.npz"))
    with pytest.raises(ConfigError, match="no expert similarity"):
        run_study(replace(small, model=model, variants=(variant,)), 1)


def test_the_command_writes_prints_and_verifies(tmp_path: Path) -> None:
    file, out = tmp_path / "mine.toml", tmp_path / "out"
    file.write_text(SMALL)
    done = CliRunner().invoke(cli, ["simulate", str(file), "--out", str(out), "--draws", "3", "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert "baseline" in done.output
    assert "3 draws of 3 variants, seed 5" in done.output
    checked = CliRunner().invoke(cli, ["verify", str(out)])
    assert checked.exit_code == 0, checked.output
    assert "3 draws of" in checked.output
    (out / "draws.csv").write_text("")
    assert isinstance(CliRunner().invoke(cli, ["verify", str(out)]).exception, ConfigError)
    other = tmp_path / "other"
    other.mkdir()
    (other / "diary.txt").write_text("mine")
    refused = CliRunner().invoke(cli, ["simulate", str(file), "--out", str(other), "--workers", "1"])
    assert isinstance(refused.exception, ConfigError)
    assert (other / "diary.txt").read_text() == "mine"
