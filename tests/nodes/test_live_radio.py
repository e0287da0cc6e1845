"""The band that devices share: who is given how much, what that costs on the emulated air, and who is refused."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.lab.device_station import ids, running, station
from tests.lab.expert_files import make_expert
from tests.lab.families import save_tiny
from tests.lab.fleet import Fleet
from tests.nodes.test_alive import ask, until
from tests.nodes.test_live_policies import Watched, opened
from tests.nodes.test_live_policies import ask as ask_lab
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.cli.main import cli
from wdmoe.config import DeviceSettings, LinkEmulation, StationSettings
from wdmoe.errors import ConfigError
from wdmoe.moe.bandwidth_share import SharedBand
from wdmoe.moe.health import DeviceHealth
from wdmoe.nodes.device.device import run_device
from wdmoe.nodes.device.link_emulation import REPLY_HEADER_BYTES, EmulatedLink, shannon_bps
from wdmoe.solver.bandwidth import Links, allocate_bandwidth
from wdmoe.transport.codec.messages import Result
from wdmoe.transport.routing import DeviceRoute
from wdmoe.wireless.rates import fixed_power_bps

BAND_HZ = 20e6
SNR_HZ = ((2e9, 3e8), (2e8, 3e7), (2e7, 3e6))  # down and up, of three devices


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("granite")
    export_bundle(save_tiny("granitemoeshared", folder / "checkpoint"), folder / "bundle", ExportSettings())
    return Bundle.open(folder / "bundle")


def links(bits: float) -> Links:
    down, up = zip(*SNR_HZ, strict=True)
    return Links(downlink_snr_hz=down, uplink_snr_hz=up, downlink_bits=bits, uplink_bits=bits)


def routes() -> tuple[DeviceRoute, ...]:
    return tuple(DeviceRoute(f"d{i}", f"d{i}", bytes([i]), *snr) for i, snr in enumerate(SNR_HZ))


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("policy", ["topk", "cosine", "bottleneck", "budget"])
def test_every_layer_gives_the_band_to_those_who_have_work(
    bundle: Bundle, policy: str, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceHealth, "other_s", lambda self, devices, tokens: None)  # so that the air alone decides
    budget_s = 5e-4 if policy == "budget" else 0.0
    with opened(bundle, policy=policy, budget_s=budget_s, bandwidth_hz=BAND_HZ, equal_bandwidth=equal) as lab:
        devices = [
            dataclasses.replace(route, downlink_snr_hz=down, uplink_snr_hz=up)
            for route, (down, up) in zip(lab.routing.devices, SNR_HZ, strict=True)
        ]
        lab.routing = dataclasses.replace(lab.routing, devices=tuple(devices))
        watched = Watched(lab)
        ask_lab(lab)
    assert len(watched.layers) > 8
    for layer in watched.layers:
        runs = {run.experts[0] % 3: run for run in layer}
        load = np.array([len(runs[home].tokens) if home in runs else 0 for home in range(3)])
        given = np.array([runs[home].bandwidth_hz if home in runs else 0.0 for home in range(3)])
        hidden = layer[0].tokens.shape[1]
        best = allocate_bandwidth(load, links(32.0 * hidden), BAND_HZ).bandwidth_hz
        assert given.sum() <= BAND_HZ * (1 + 1e-12)
        np.testing.assert_allclose(given, np.where(load > 0, BAND_HZ / 3 if equal else best, 0.0), rtol=1e-9)


def test_rules_that_change_between_answers_change_the_shares(bundle: Bundle) -> None:
    with opened(bundle, bandwidth_hz=BAND_HZ) as lab:
        devices = [
            dataclasses.replace(route, downlink_snr_hz=down, uplink_snr_hz=up)
            for route, (down, up) in zip(lab.routing.devices, SNR_HZ, strict=True)
        ]
        lab.routing = dataclasses.replace(lab.routing, devices=tuple(devices))
        given = []
        for changes in ({}, {"equal_bandwidth": True}, {"rehearsal": True}):
            lab.layers.rules = dataclasses.replace(lab.layers.rules, **changes)
            watched = Watched(lab)
            ask_lab(lab)
            given.append({round(run.bandwidth_hz / BAND_HZ, 3) for run in watched.runs})
    assert len(given[0]) > 3
    assert given[1:] == [{0.333}, {0.0}]


def test_policies_know_a_device_by_its_part_of_an_equal_band() -> None:
    bits, each_hz = 8192.0, BAND_HZ / 3
    air = SharedBand(routes(), bits, BAND_HZ, equal=False)
    by_hand = [sum(bits / fixed_power_bps(each_hz, snr) for snr in snrs) for snrs in SNR_HZ]
    np.testing.assert_allclose(air.each_s, by_hand)
    other_s = np.array([1e-3, 2e-3, 0.0])
    assert air.links(other_s).table[4].tolist() == other_s.tolist()
    alone = air.share([0, 5, 0], other_s)
    assert alone[1] == pytest.approx(BAND_HZ)
    equal = SharedBand(routes(), bits, BAND_HZ, equal=True)
    np.testing.assert_array_equal(equal.share([0, 5, 0], other_s), [each_hz] * 3)
    own = SharedBand(routes(), bits, 0.0, equal=False)
    assert not own.each_s.any()
    assert not own.links(other_s).table[:2].any()


def test_the_emulated_rate_is_the_one_of_the_model() -> None:
    for band_hz, snr_hz in ((1.0, 1e24), (20e6, 2e9), (1e24, 1.0), (1e-9, 1.0)):
        assert shannon_bps(band_hz, snr_hz) == pytest.approx(float(fixed_power_bps(band_hz, snr_hz)), rel=1e-12)


def test_fixed_rates_serve_where_no_band_is_shared() -> None:
    link = EmulatedLink(LinkEmulation(downlink_bps=8e3, downlink_snr_hz=1e6, uplink_snr_hz=1e6))
    assert link.down.cross(10.0, 1000) == pytest.approx(11.0)
    assert link.up.cross(10.0, 1000) == 10.0
    assert link.up.cross(10.0, 1000, 1e6) == pytest.approx(10.0 + 8e3 / 1e6)  # SNR 1: a bit each second and hertz
    assert EmulatedLink(LinkEmulation(uplink_bps=8e3)).up.cross(10.0, 1000, 1e6) == pytest.approx(11.0)


def test_a_device_waits_as_long_as_its_part_of_the_band_says(tmp_path: Path, rng: Any) -> None:
    band_hz, down_hz, up_hz = 1e5, 4e6, 2e5
    (one,) = ids(0, 0)

    async def work() -> None:
        async with station(tmp_path / "bs", {one: make_expert(rng, 16, 8)}) as bs:
            link = LinkEmulation(downlink_snr_hz=down_hz, uplink_snr_hz=up_hz)
            folders = {"cache": tmp_path / "cache", "state": tmp_path / "device"}
            async with running(run_device(DeviceSettings(join=bs.token(), link=link, **folders))):
                await bs.place_on(one)
                await bs.ready(one)
                tokens = rng.standard_normal((32, 16)).astype(np.float32)
                result = await bs.run(0, tokens, bandwidth_hz=band_hz)
                assert isinstance(result, Result)
                down_bits, up_bits = 8 * bs.sent_bytes, 8 * (tokens.nbytes + REPLY_HEADER_BYTES)
                assert result.link_down_s == pytest.approx(down_bits / fixed_power_bps(band_hz, down_hz), abs=1e-6)
                assert result.link_up_s == pytest.approx(up_bits / fixed_power_bps(band_hz, up_hz), abs=1e-6)
                free = await bs.run(0, tokens)  # no band, and no fixed rate either
                assert isinstance(free, Result)
                assert (free.link_down_s, free.link_up_s) == (0, 0)

    asyncio.run(work())


def test_a_station_that_shares_a_band(bundle: Bundle, tmp_path: Path) -> None:
    with opened(bundle) as lab:
        wanted, _ = ask_lab(lab)
    fleet = Fleet(tmp_path)
    try:
        with fleet.serve(bundle.root, devices=0, bandwidth_hz=BAND_HZ, policy="budget", budget_s=1e6) as shared:
            for snr in SNR_HZ[:2]:
                fleet.token = shared.join_text
                fleet.add_device("--link-snr", f"{snr[0]:.0f}Hz/{snr[1]:.0f}Hz")
            fleet.wait(shared, 2)
            found, devices, receipt = ask(fleet, shared, len(wanted))
            assert (found, receipt.dropped_weight) == (wanted, 0.0)
            assert devices == {"device0", "device1"}
            overview = shared.overview()
            assert (overview["bandwidth_hz"], overview["allocation"]) == (BAND_HZ, "optimal")
            fleet.token = shared.join_text
            stranger = fleet.add_device()
            until(fleet, lambda: "a device must say how strong its link is: --link-snr" in stranger.said())
            assert stranger.process.poll() is None  # it tries again, slowly: stations change
            assert len(shared.control.roster.live()) == 2
    finally:
        fleet.close()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bandwidth_hz": -1.0}, "bandwidth must be from 1 Hz"),
        ({"bandwidth_hz": float("nan")}, "bandwidth must be from 1 Hz"),
        ({"bandwidth_hz": 1e6, "allocation": "fair"}, "allocation must be one of optimal, equal"),
    ],
)
def test_bands_that_are_none(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        StationSettings(bundle=tmp_path, **wrong)


@pytest.mark.parametrize("wrong", [(1e6, 0.0), (0.0, 1e6), (1e25, 1e6), (-1.0, 1.0), (float("nan"), 1.0)])
def test_links_that_are_none(wrong: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="link SNRs must both be"):
        LinkEmulation(downlink_snr_hz=wrong[0], uplink_snr_hz=wrong[1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["device", "--join", "x", "--link-snr", "0"], "must be from 1 Hz"),
        (["device", "--join", "x", "--link-snr", "1GHz/"], "is not a frequency"),
        (["device", "--join", "x", "--link-snr", "20dB"], "no frequency has the unit 'dB'"),
        (["demo", "--bandwidth", "1MHz", "--links", "1Mbit/s"], "give only one of them"),
        (["bs", "nowhere", "--allocation", "equal"], "--allocation says how --bandwidth is shared"),
        (["bs", "nowhere", "--bandwidth", "1MHz", "--allocation", "fair"], "'fair' is not one of"),
    ],
)
def test_flags_that_are_wrong(words: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2
    assert said in done.output
