"""Path loss and line of sight against Sionna 2 (`pip install sionna-no-rt`), where it is installed."""

import numpy as np
import pytest

from wdmoe.wireless.tr38901 import INH_MIXED, INH_OPEN, UMA, UMI, los_probability, path_loss_db, shadowing_sigma_db

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
sionna = pytest.importorskip("sionna.phy.channel.tr38901", reason="Sionna 2 is not installed")

# Sionna takes 299,792,458 m/s for the breakpoint, the report 3.0e8: 19 log10 of their ratio is 0.006 dB.
TOLERANCE_DB = 0.01
OPTIONS = {"direction": "downlink", "precision": "double", "device": "cpu"}
DISTANCES_M = {"umi": (10, 4900), "uma": (10, 4900), "inh-open": (1, 140), "inh-mixed": (1, 140)}


def their_scenario(scenario, carrier_hz):
    antenna = sionna.PanelArray(
        num_rows_per_panel=1, num_cols_per_panel=1, polarization="single", polarization_type="V",
        antenna_pattern="omni", carrier_frequency=carrier_hz, precision="double", device="cpu",
    )  # fmt: skip
    arrays = {"ut_array": antenna, "bs_array": antenna}
    if scenario.name.startswith("inh"):
        kind = scenario.name.removeprefix("inh-")
        return sionna.InHScenario(carrier_hz, kind, **arrays, **OPTIONS)
    made = sionna.UMiScenario if scenario.name == "umi" else sionna.UMaScenario
    return made(carrier_hz, "low", **arrays, **OPTIONS)


def place(theirs, scenario, distances_m, height_m, los):
    """Devices on a line from the base station."""
    count = distances_m.size
    still = torch.zeros(1, count, 3, dtype=torch.float64)
    devices = still.clone()
    devices[0, :, 0] = torch.as_tensor(distances_m)
    devices[0, :, 2] = height_m
    station = torch.tensor([[[0.0, 0.0, scenario.station_height_m]]], dtype=torch.float64)
    indoor = torch.full((1, count), scenario.name.startswith("inh"))
    theirs.set_topology(devices, station, still, torch.zeros_like(station), still, indoor, los)
    return theirs


@pytest.mark.parametrize("los", [True, False])
@pytest.mark.parametrize("carrier_hz", [0.7e9, 3.5e9, 28e9])
@pytest.mark.parametrize("scenario", [UMI, UMA, INH_OPEN, INH_MIXED], ids=lambda scenario: scenario.name)
def test_path_loss_is_theirs(scenario, carrier_hz, los):
    distances = np.geomspace(*DISTANCES_M[scenario.name], 60)
    height = scenario.device_height_m
    theirs = place(their_scenario(scenario, carrier_hz), scenario, distances, height, los)
    ours = path_loss_db(scenario, distances, carrier_hz, los)
    np.testing.assert_allclose(theirs.basic_pathloss.numpy().reshape(-1), ours, atol=TOLERANCE_DB, rtol=0)
    # Theirs keeps the logarithm of the power ratio: tenths of decibels
    sigma = 10 * theirs.lsp_log_std.numpy()[0, 0, :, 3]
    np.testing.assert_allclose(sigma, shadowing_sigma_db(scenario, los), rtol=1e-6)


@pytest.mark.parametrize("height_m", [1.5, 12.0])
def test_height_of_devices_counts_as_theirs(height_m):
    distances = np.geomspace(20, 2000, 40)
    for scenario in (UMI, UMA):
        theirs = place(their_scenario(scenario, 6e9), scenario, distances, height_m, False)
        ours = path_loss_db(scenario, distances, 6e9, False, device_height_m=height_m)
        np.testing.assert_allclose(theirs.basic_pathloss.numpy().reshape(-1), ours, atol=TOLERANCE_DB, rtol=0)


@pytest.mark.parametrize("scenario", [UMI, UMA, INH_OPEN, INH_MIXED], ids=lambda scenario: scenario.name)
def test_line_of_sight_is_as_likely_as_theirs(scenario):
    distances = np.geomspace(*DISTANCES_M[scenario.name], 60)
    heights = (1.0,) if scenario.name.startswith("inh") else (1.5, 20.0)
    for height in heights:
        theirs = place(their_scenario(scenario, 3.5e9), scenario, distances, height, True)
        probability = np.minimum(theirs.los_probability.numpy().reshape(-1), 1.0)
        np.testing.assert_allclose(probability, los_probability(scenario, distances, height), rtol=1e-9)
