"""Keys of a scenario that nothing would look at are refused, each by its name and with what would."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from wdmoe.cli.main import cli
from wdmoe.errors import ConfigError
from wdmoe.simulation.scenario_file import parse_scenario
from wdmoe.simulation.study import run_study
from wdmoe.simulation.used_keys import CHANNEL_USES, VARIANT_USES, model_uses

ROOT = Path(__file__).resolve().parents[2]
FILE = """
name = "x"
draws = 2
[radio]
[channel]
{channel}
[devices]
count = 4
experts = 2
[model]
hidden = 512
inner = 1024
tokens = 8
{model}
[[variant]]
name = "a"
bandwidth = "equal"
{variant}
"""
# what each key is for, by hand: the table in the code must not be its own judge
POLICIES = {"topk": "", "cosine": "", "bottleneck": "", "budget": "max_dropped = 0.1"}
OF_POLICY = {
    "light = 0.2": {"bottleneck"},
    "theta = 0.4": {"cosine"},
    "theta_step = 0.1": {"cosine"},
    "gamma = 9.0": {"cosine"},
    "whole_layers = 1": {"cosine", "bottleneck", "budget"},
    'rank = "energy"': {"cosine", "bottleneck", "budget"},
}


def text(*, channel: str = "", model: str = "", variant: str = "") -> str:
    return FILE.format(channel=channel, model=model, variant=variant)


@pytest.mark.parametrize(("key", "policy"), list(product(OF_POLICY, POLICIES)))
def test_a_key_of_another_policy_is_refused(key: str, policy: str) -> None:
    file = text(variant=f'policy = "{policy}"\n{POLICIES[policy]}\n{key}')
    if policy in OF_POLICY[key]:
        parse_scenario(file)
        return
    with pytest.raises(ConfigError, match=r"\[\[variant\]\] 'a': " + key.split()[0] + " does nothing here: it is for"):
        parse_scenario(file)


@pytest.mark.parametrize(
    ("places", "named"),
    [
        ({"variant": "max_dropped = 0.3"}, 'max_dropped does nothing here: it is for policy = "budget"'),
        ({"variant": 'budget = "1ms"'}, "budget does nothing"),
        ({"variant": "coarse_share = 0.5"}, "coarse_share does nothing here: it is for coarse_bits above 0"),
        ({"variant": "bits = 8\ncoarse_bits = 8"}, "coarse_bits does nothing"),
        ({"variant": "bits = 4\nmax_distortion = 0.5"}, "max_distortion does nothing"),
        ({"variant": "times_faster = 3.0"}, "times_faster does nothing"),
        ({"variant": "least_similarity = 1.5"}, "least_similarity does nothing"),
        ({"variant": "analog_ratio = 2.0"}, 'analog_ratio does nothing here: it is for downlink = "analog"'),
        ({"channel": 'path_loss = "umi"\nexponent = 2.0'}, "exponent does nothing"),
        ({"channel": 'path_loss = "umi"\nshadowing_db = 4.0'}, "shadowing_db does nothing"),
        ({"channel": "k_factor_db = 3.0"}, 'k_factor_db does nothing here: it is for fading = "rician"'),
        ({"channel": 'fading = "none"\nfading_changes = "layer"'}, "fading_changes does nothing"),
        ({"channel": 'block_time = "2ms"'}, "block_time does nothing"),
        ({"model": "weight_bytes = 4.0"}, r"\[model\]: weight_bytes does nothing here: it is for \[devices\]"),
    ],
)
def test_a_key_of_another_mode_is_refused(places: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        parse_scenario(text(**places))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "places",
    [
        {"variant": 'policy = "budget"\nbudget = "1ms"'},
        {"variant": 'coarse_bits = 8\ncoarse_share = 0.5\nrank = "energy"'},
        {"variant": 'max_distortion = 0.1\nrank = "energy"'},
        {"variant": 'downlink = "analog"\nanalog_ratio = 2.0'},
        {"channel": 'fading = "rician"\nk_factor_db = 3.0\nfading_changes = "layer"'},
        {"channel": 'fading_changes = "doppler"\nspeed_m_s = 1.0\nblock_time = "2ms"'},
    ],
)
def test_a_key_that_is_used_is_taken(places: dict[str, str]) -> None:
    parse_scenario(text(**places))


@pytest.mark.parametrize(
    ("bounds", "got"),
    [("", "neither"), ('max_dropped = 0.1\nbudget = "1ms"', "max_dropped and budget"), ('budget = "0ms"', "above 0")],
)
def test_policy_budget_needs_one_bound(bounds: str, got: str) -> None:
    with pytest.raises(ConfigError, match=f"'a'.*{got}"):
        parse_scenario(text(variant=f'policy = "budget"\n{bounds}'))


def test_half_an_expert_is_none() -> None:
    """It was cut to a whole number."""
    with pytest.raises(ConfigError, match=r"experts must be whole numbers, got 2\.5"):
        parse_scenario(text().replace("experts = 2", "experts = 2.5"))


def test_copies_need_room() -> None:
    full = parse_scenario(text(variant="replicas = 2"))  # 4 devices of 2 experts for 8 experts
    with pytest.raises(ConfigError, match=r"'a': replicas does nothing here: .* room for 8 experts"):
        run_study(full, 1)


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8")
    for use in (*VARIANT_USES, *CHANNEL_USES, *model_uses(False)):
        assert f"| {', '.join(f'`{key}`' for key in use.keys)} | {use.by} |\n" in page


def test_nobody_in_reach_is_an_outage_and_no_latency(tmp_path: Path) -> None:
    file = tmp_path / "far.toml"
    file.write_text(text(channel="exponent = 10.0"), encoding="utf-8")
    study = run_study(parse_scenario(file.read_text(encoding="utf-8")), 1)
    assert np.isinf(study.of("latency_s")).all()
    ran = CliRunner().invoke(cli, ["simulate", str(file), "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert ran.exit_code == 0
    assert "a: a device with work was out of reach on every draw" in ran.output
    assert "nan" not in ran.output
