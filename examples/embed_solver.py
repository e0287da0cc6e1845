"""One MoE layer in a program of your own: who gets how many hertz, and which experts are worth their time."""

import numpy as np

from wdmoe.solver import Links, allocate_bandwidth, select_within_budget

rng = np.random.default_rng(1)
tokens, experts, devices, total_hz = 64, 16, 8, 100e6
gate = rng.dirichlet(np.ones(experts), tokens)  # (tokens, experts): what your gate says
chosen = np.argsort(-gate, axis=1)[:, :2]  # (tokens, 2): its top-2
weights = np.take_along_axis(gate, chosen, axis=1)
device_of = np.arange(experts) % devices  # who holds which expert
snr_hz = total_hz * 10 ** rng.uniform(0, 3, devices)  # received power over noise density
links = Links(downlink_snr_hz=snr_hz, uplink_snr_hz=snr_hz, downlink_bits=65536, uplink_bits=65536, compute_s=1e-4)

load = np.bincount(device_of[chosen].ravel(), minlength=devices)  # tokens for each device
all_of_it = allocate_bandwidth(load, links, total_hz)
print(f"everything: {1e3 * all_of_it.latency_s:.2f} ms, surely no less than {1e3 * all_of_it.lower_bound_s:.2f} ms")

part = select_within_budget(chosen, weights, device_of, links, total_hz, budget_s=0.7 * all_of_it.latency_s)
share = part.kept / weights.sum()
print(f"in 70 % of it: {1e3 * part.latency_s:.2f} ms, {share:.1%} of the gate's weight ({part.status})")
print("MHz:", (part.bandwidth_hz / 1e6).round(1))
