"""`wdmoe.solver` inside other programs: what it imports, its example, and calls from many threads at once."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.lab.waiting import PATIENCE_S
from wdmoe import solver

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "embed_solver.py"
THREADS, CALLS = 8, 12


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_numpy_and_the_standard_library_are_imported():
    code = (
        "import json, sys, numpy\n"
        "before = set(sys.modules)\n"
        "import wdmoe.solver\n"
        "print(json.dumps(sorted(name.partition('.')[0] for name in set(sys.modules) - before)))"
    )
    foreign = set(json.loads(run("-c", code))) - set(sys.stdlib_module_names) - {"numpy", "wdmoe"}
    assert {name for name in foreign if not name.startswith(("_cython_", "cython_runtime"))} == set()


def test_nothing_of_wdmoe_above_the_solver_is_imported():
    code = "import json, sys, wdmoe.solver; print(json.dumps([n for n in sys.modules if n.startswith('wdmoe.')]))"
    below = {"solver", "arrays", "config", "errors", "former_paths", "units"}
    assert {name.split(".")[1] for name in json.loads(run("-c", code))} <= below


def test_the_example_runs_and_is_short():
    printed = run(str(EXAMPLE))
    assert "everything:" in printed
    assert "(within)" in printed
    code = [line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(code) <= 25
    assert EXAMPLE.read_text(encoding="utf-8") in (ROOT / "docs" / "guide_embedding.md").read_text(encoding="utf-8")
    assert {line.split()[1] for line in code if line.startswith(("import", "from"))} == {"numpy", "wdmoe.solver"}


class Shared:
    """Inputs that all threads read."""

    def __init__(self, rng):
        self.gate = rng.dirichlet(np.ones(16), 200)
        self.experts = np.argsort(-self.gate, axis=1)[:, :4].astype(np.int32)
        self.weights = np.take_along_axis(self.gate, self.experts, axis=1)
        self.device_of = (np.arange(16) % 6).astype(np.int32)
        self.latency_s = rng.uniform(1e-3, 1e-2, 16)
        self.links = solver.Links(**self._links(rng, 6))
        self.draws = solver.Links(**self._links(rng, (10, 6)))
        self.load = rng.poisson(9, (5, 6)).astype(float)
        self.partial, self.rows = rng.random((200, 32), np.float32), np.arange(200, dtype=np.int32)

    @staticmethod
    def _links(rng, shape):
        return {
            "downlink_snr_hz": 1e8 * 10 ** rng.uniform(-1, 2, shape),
            "uplink_snr_hz": 1e8 * 10 ** rng.uniform(-1, 2, shape),
            "downlink_bits": 65536.0,
            "uplink_bits": 65536.0,
            "compute_s": 1e-4,
        }


def added(s):
    out = np.zeros((200, 32), np.float32)
    solver.combine_partials(out, s.partial, s.rows)
    return out


# What each call gives, as arrays and numbers.
CALLED = {
    "allocate_bandwidth": lambda s: bands(solver.allocate_bandwidth(s.load, s.links, 1e8)),
    "one block": lambda s: bands(solver.allocate_bandwidth(s.load[0], s.links, 1e8)),
    "floors": lambda s: bands(solver.allocate_bandwidth(s.load, s.links, 1e8, floor_hz=1e6, cap_hz=6e7)),
    "allocate_bandwidth_many": lambda s: [
        part for answer in solver.allocate_bandwidth_many(s.load, s.draws, 1e8, warm=True) for part in bands(answer)
    ],
    "select_experts": lambda s: chosen(solver.select_experts(s.gate, s.latency_s, "cosine", 4)),
    "prune_experts": lambda s: chosen(solver.prune_experts(s.experts, s.weights, s.latency_s, "cosine")),
    "select_within_budget": lambda s: kept(
        solver.select_within_budget(s.experts, s.weights, s.device_of, s.links, 1e8, 0.2)
    ),
    "select_at_most_dropped": lambda s: kept(
        solver.select_at_most_dropped(s.experts, s.weights, s.device_of, s.links, 1e8, 0.1)
    ),
    "shed_bottleneck": lambda s: [solver.shed_bottleneck(s.experts, s.weights, s.device_of, s.latency_s[:6])],
    "group_by_device": lambda s: [
        part
        for work in solver.group_by_device(s.experts, s.weights.astype(np.float32), s.device_of)
        for part in (work.token_rows, work.rows, work.weights)
    ],
    "combine": lambda s: [solver.combine(200, 32, [(s.partial, s.rows)] * 3, s.weights[:, 0])],
    "combine_partials": lambda s: [added(s)],
    "is_finite": lambda s: [solver.is_finite(s.partial)],
    "choose_copies": lambda s: [solver.choose_copies(s.experts, s.gate[:16, :6] > 0.05, s.latency_s[:6])],
    "replace_far": lambda s: [solver.replace_far(s.experts, s.weights, s.gate[:16, :16], s.latency_s, 0.01)],
    "place_experts": lambda s: [
        solver.place_experts(np.ones(16), s.latency_s, np.full(6, 4.0), np.ones(6), np.zeros(16, int))
    ],
}


def bands(answer):
    return [answer.bandwidth_hz, answer.block_latency_s, answer.weight, answer.latency_s, answer.lower_bound_s]


def chosen(choice):
    return [choice.experts, choice.weights, choice.dropped_weight, choice.wlr]


def kept(choice):
    return [choice.experts, choice.weights, choice.bandwidth_hz, choice.latency_s, choice.kept, choice.upper_bound]


def test_threads_get_what_one_thread_gets(rng):
    shared = Shared(rng)
    alone = {name: call(shared) for name, call in CALLED.items()}

    def all_calls(first):
        names = list(CALLED)
        for i in range(CALLS * len(names)):
            name = names[(first + i) % len(names)]
            for got, expected in zip(CALLED[name](shared), alone[name], strict=True):
                np.testing.assert_array_equal(got, expected, err_msg=name)
        return True

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(all_calls, range(THREADS)))
