"""Random small cases of the policy `budget`: for the tests and for `tools/study/check_budget`."""

from __future__ import annotations

import numpy as np

from wdmoe.solver import Links

TOTAL_HZ = 20e6
SLACK = 1e-7


def some_links(rng: np.random.Generator, devices: int) -> Links:
    return Links(
        downlink_snr_hz=10 ** rng.uniform(5, 9, devices),  # 40 dB
        uplink_snr_hz=10 ** rng.uniform(5, 9, devices),
        downlink_bits=np.full(devices, 16384.0),
        uplink_bits=np.full(devices, 16384.0),
        compute_s=rng.uniform(0, 2e-4, devices),
    )


def small_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Links, float]:
    rng = np.random.default_rng(seed)
    tokens, top_k, count, devices = rng.integers(1, 6), rng.integers(1, 4), 6, int(rng.integers(1, 5))
    experts = np.array([rng.permutation(count)[:top_k] for _ in range(tokens)], np.int32)
    weights = rng.dirichlet(np.ones(top_k), tokens)
    device_of = rng.integers(0, devices, count)
    return experts, weights, device_of, some_links(rng, devices), 10 ** rng.uniform(-2.8, -0.5)
