"""Commands and calls that were answered wrongly: the solver, scenarios, tokens. No cluster is needed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from tests.lab.waiting import free_ports
from tools.bench.catalogue.client import fetch
from tools.bench.catalogue.cluster import run_command
from tools.bench.catalogue.fault import Check, Checkup, Fault
from tools.bench.catalogue.processes import ROOT, Node

_LINKS = """
import numpy as np
from wdmoe.solver import *
L = Links(downlink_snr_hz=np.ones(2), uplink_snr_hz=np.ones(2), downlink_bits=0, uplink_bits=0)
M = Links(downlink_snr_hz=np.ones((3, 2)), uplink_snr_hz=1.0, downlink_bits=0, uplink_bits=0)
"""
ZERO_COST = {
    "plain": "allocate_bandwidth([5.0, 1], L, 1e6)",
    "floor": "allocate_bandwidth([5.0, 1], L, 1e6, floor_hz=0.0)",
    "cap": "allocate_bandwidth([5.0, 1], L, 1e6, cap_hz=1e6)",
    "fixed": "allocate_bandwidth([5.0, 1], L, 1e6, fixed_s=[0.0, 0.0])",
    "two blocks": "allocate_bandwidth([[5.0, 1], [1, 1]], L, 1e6)",
    "many": "allocate_bandwidth_many([[5.0, 1]], M, 1e6)",
    "many with floor": "allocate_bandwidth_many([[5.0, 1]], M, 1e6, floor_hz=1.0)",
    "warm": "allocate_bandwidth([5.0, 1], L, 1e6, start=allocate_bandwidth([5.0, 1], L, 1e6))",
    "budget": "select_within_budget([[0, 1]], [[0.5, 0.5]], [0, 1], L, 1e6, 1.0)",
    "dropped": "select_at_most_dropped([[0, 1]], [[0.5, 0.5]], [0, 1], L, 1e6, 0.1)",
}
_PROOF = """
import sys
import numpy as np
from wdmoe.solver import *
rng, bad = np.random.default_rng(int(sys.argv[1])), []
def look(loads, **links):
    answer = allocate_bandwidth(loads, Links(**links), 1e6)
    gap = answer.latency_s - answer.lower_bound_s
    if answer.status == "optimal" and not gap <= 1e-4 * answer.latency_s + 1e-12:
        bad.append((answer.latency_s, answer.lower_bound_s))
look([.1, 1, 1], downlink_bits=[.01, 1, 1], uplink_bits=[1e-4, 1, 1], downlink_snr_hz=1., uplink_snr_hz=1.,
     compute_s=[1e8, 1, 1])
for _ in range(300):
    n = int(rng.integers(1, 7))
    sizes = [10.0 ** rng.uniform(-4, 8, n) * (rng.random(n) < 0.8) for _ in range(3)]
    look(rng.uniform(0, 5, n), downlink_bits=sizes[0], uplink_bits=sizes[1], compute_s=sizes[2],
         downlink_snr_hz=10.0 ** rng.uniform(0, 9, n), uplink_snr_hz=10.0 ** rng.uniform(0, 9, n))
print(bad[:1] or "")
sys.exit(len(bad) > 0)
"""
_SCENARIO = """name = "x"
draws = 2
[radio]
[channel]
[devices]
count = 4
experts = 2
[model]
hidden = 512
inner = 1024
tokens = 8
[[variant]]
name = "a"
bandwidth = "equal"
"""
UNUSED = {
    "gamma": "gamma = 9.0\n",
    "max_dropped": "max_dropped = 0.3\n",
    "budget": 'policy = "budget"\n',
    "gamma ": 'policy = "bottleneck"\ngamma = 9.0\n',
}
TOKEN = re.compile(r"wdmoe1\.[A-Za-z0-9_-]{20,}")


class SolverCrash(Check):
    id = "I8"
    title = "the solver with devices that cost no time, and with costs from 1e-4 to 1e8"
    passes = "no crash; `optimal` only with a bound that proves it"
    cost_s = 1.5

    def check(self, scene: Checkup) -> None:
        kinds = [*ZERO_COST, "300 random cases"]
        kind = scene.choose(kinds)
        code = f"{_LINKS}\nprint({ZERO_COST[kind]})" if kind in ZERO_COST else _PROOF
        words = [sys.executable, "-c", code, str(scene.rng.randrange(2**31))]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        scene.require(done.returncode >= 0, f"{kind}: ended by signal {-done.returncode}")
        refused = done.returncode == 1 and "ValueError" in done.stderr
        if kind in ZERO_COST:
            scene.require(done.returncode <= 0 or refused, f"{kind}: {done.stderr.strip()[-160:]}")
        else:
            scene.require(done.returncode == 0, f"optimal without proof: {done.stdout.strip() or done.stderr[-160:]}")


class UnusedKeys(Check):
    id = "I9"
    title = "a scenario with a key that its policy does not use, or a budget without a bound"
    passes = "refused, naming the key"
    tries = 20
    cost_s = 2.0

    def check(self, scene: Checkup) -> None:
        kind = scene.choose(list(UNUSED))
        file = scene.folder / "scenario.toml"
        file.write_text(_SCENARIO + UNUSED[kind])
        done = run_command("simulate", str(file), "--out", str(scene.folder / "out"))
        if "No such option" in done.stderr:
            done = run_command("simulate", str(file), str(scene.folder / "out"))
        scene.require(done.returncode != 0, f"{UNUSED[kind].strip()!r} was accepted")
        scene.require(kind.strip() in done.stderr or not done.returncode, f"says {done.stderr.strip()[-160:]!r}")


class TokenTypo(Check):
    id = "I12"
    title = "`token` with a state folder that is not there"
    passes = "an error, and no folder is made"
    tries = 20
    cost_s = 1.0

    def check(self, scene: Checkup) -> None:
        state = scene.folder / "typo"
        kind = scene.choose(("create", "list", "revoke"))
        words = ("token", kind, *(("kitchen",) if kind == "revoke" else ()), "--state", str(state))
        done = run_command(*words)
        scene.require(done.returncode != 0, f"`token {kind}` on a folder that is not there ends with exit code 0")
        scene.require(not state.exists(), f"`token {kind}` made the folder")
        scene.require("Traceback" not in done.stderr, "a traceback")


class TokenPrinted(Check):
    id = "I13"
    title = "a base station starts with its output in a file"
    passes = "no join token in it; the token stands in a file of mode 0600, with a bound on its uses"
    tries = 5
    cost_s = 8.0

    def check(self, scene: Checkup) -> None:
        from tools.bench.catalogue.model import made_up

        port, state = free_ports(3), scene.folder / "bs"
        _, bundle = made_up("small", scene.folder)
        words = ["bs", str(bundle), "--bind", f"tcp://127.0.0.1:{port}", "--http", f"127.0.0.1:{port + 2}"]
        node = Node("printed", [*words, "--state", str(state)], scene.folder).start()
        try:
            until_s = time.monotonic() + 60
            while fetch(port + 2, "/wdmoe/status") is None and time.monotonic() < until_s:
                time.sleep(0.1)
        finally:
            node.end()
        scene.require(not TOKEN.search(node.said()), "the join token stands in the output")
        self._look_at(scene, state / "join-token")
        unlimited = [file for file in (state / "tokens").glob("*.json") if "uses_left" not in file.read_text()]
        scene.require(not unlimited, "the token has no bound on its uses")

    def _look_at(self, scene: Checkup, file: Path) -> None:
        scene.require(file.exists(), f"there is no {file.name} in the state folder")
        if file.exists():
            scene.require(file.stat().st_mode & 0o077 == 0, f"{file.name} has mode {file.stat().st_mode & 0o777:o}")


FAULTS: tuple[type[Fault], ...] = (SolverCrash, UnusedKeys, TokenTypo, TokenPrinted)
