"""Which emulated link each device of the demo gets. Plain arithmetic."""

from __future__ import annotations

import random
from collections.abc import Sequence

from wdmoe.config import LinkEmulation
from wdmoe.errors import ConfigError

Links = tuple[LinkEmulation, ...]

FASTEST_BPS = 200e6
SLOWEST_BPS = 20e6
# Received power over noise density: in 20 MHz from 28 to -2 dB, as between 30 m and 200 m in a street (35 dB a decade).
STRONGEST_SNR_HZ = 20e6 * 10**2.8
SPREAD = 1000.0  # 30 dB
UPLINK_PART = 0.1  # a device sends with a tenth of what it is sent with


def unequal_links(devices: int, rates_bps: Sequence[float], seed: int) -> Links:
    """Links that differ by device, the same in both directions.

    Args:
        devices: how many.
        rates_bps: one rate per device, used as they stand; or two, the ends of a geometric row that the seed
            deals out; or one for all; or none for 200 to 20 Mbit/s. Rate 0 emulates nothing.
        seed: decides which device is the slow one.
    Raises:
        ConfigError: another number of rates, or a row with an end of zero.
    """
    rates = tuple(rates_bps) or (FASTEST_BPS, SLOWEST_BPS)
    if len(rates) == devices and rates_bps:
        return _links(rates)
    if len(rates) == 1:
        return _links(rates * devices)
    if len(rates) != 2:
        raise ConfigError(f"links needs 1, 2 or {devices} rates for {devices} devices, got {len(rates)}")
    if min(rates) <= 0:
        raise ConfigError("links: the two ends of a row must be above zero; give 0 alone to emulate no links")
    step = (rates[1] / rates[0]) ** (1 / max(devices - 1, 1))
    row = [rates[0] * step**index for index in range(devices)]
    random.Random(seed).shuffle(row)  # noqa: S311 - no secret
    return _links(row)


def radio_links(devices: int, seed: int, strongest_snr_hz: float = STRONGEST_SNR_HZ, spread: float = SPREAD) -> Links:
    """Links of unequal strength, for a band that is shared: a geometric row, which the seed deals out.

    Args:
        devices: how many.
        seed: decides which device is the far one.
        strongest_snr_hz: downlink of the nearest device, received power over noise density.
        spread: how many times as strong it is as that of the farthest.
    """
    step = spread ** (-1 / max(devices - 1, 1))
    row = [strongest_snr_hz * step**index for index in range(devices)]
    random.Random(seed).shuffle(row)  # noqa: S311 - no secret
    return tuple(LinkEmulation(downlink_snr_hz=snr, uplink_snr_hz=snr * UPLINK_PART) for snr in row)


def equal_links(links: Links) -> Links:
    """As many links with the same total rate, all alike."""
    down_bps = sum(link.downlink_bps for link in links) / len(links)
    up_bps = sum(link.uplink_bps for link in links) / len(links)
    return (LinkEmulation(downlink_bps=down_bps, uplink_bps=up_bps),) * len(links)


def _links(rates_bps: Sequence[float]) -> Links:
    return tuple(LinkEmulation(downlink_bps=rate, uplink_bps=rate) for rate in rates_bps)
