"""One MoE layer on real device processes, and beside it the raw echo that it is compared with."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.lab import SEED

ROOT = Path(__file__).resolve().parents[2]
PAUSE = struct.Struct("<d")


def echo_server() -> None:
    """Child process: sends back what it gets, on blocking sockets, until its parent closes standard input.

    The first line of standard input is its secret key: on the command line `ps` would show it, and a key that
    begins with a dash would be read as an option.
    """
    import zmq

    server_secret = os.read(0, 41).decode().strip()  # not through sys.stdin, which would read ahead
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.curve_secretkey = server_secret.encode()
    socket.curve_publickey = zmq.curve_public(server_secret.encode())
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(port, flush=True)
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if sys.stdin.fileno() in ready:
            return
        frames = socket.recv_multipart()
        until = time.perf_counter() + PAUSE.unpack_from(frames[1])[0]
        while time.perf_counter() < until:
            pass
        socket.send_multipart(frames)


class Echo:
    """The blocking end of the raw echo."""

    def __init__(self, payload_bytes: int) -> None:
        import zmq

        public, secret = zmq.curve_keypair()
        command = [sys.executable, "-m", "tools.bench.one_layer"]
        self._child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(secret.decode(), file=self._child.stdin, flush=True)
        port = int(self._child.stdout.readline())
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        own_public, own_secret = zmq.curve_keypair()
        self._socket.curve_serverkey = public
        self._socket.curve_publickey, self._socket.curve_secretkey = own_public, own_secret
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        # A header of the size of ours, and one token.
        self._payload = np.random.default_rng(SEED).bytes(payload_bytes)

    def once(self, pause_s: float = 0.0) -> float:
        """Seconds of one echo, less the pause for which the other process computes before it answers."""
        header = PAUSE.pack(pause_s) + bytes(112)
        begun = time.perf_counter()
        self._socket.send_multipart([header, self._payload])
        self._socket.recv_multipart()
        return time.perf_counter() - begun - pause_s

    def close(self) -> None:
        self._context.destroy(0)
        self._child.communicate(timeout=10)  # closes its standard input, which ends it


def synthetic_bundle(folder: Path, hidden: int) -> Path:
    """A one-layer Mixtral of the given width with small random experts, exported."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    from wdmoe.backbone.export.export import ExportSettings, export_bundle

    torch.manual_seed(SEED)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=hidden // 4,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))  # noqa: S106
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    export_bundle(folder / "model", folder / "bundle", ExportSettings())
    return folder / "bundle"


def one_token(hidden: int) -> Any:
    return np.random.default_rng(SEED).standard_normal((1, hidden)).astype(np.float32)


def demands(count: int, experts: int = 2) -> list[Any]:
    """What the gate asks for in so many layers: some of 8 experts, each as heavy as the others."""
    from wdmoe.layer_call import Demand

    rng = np.random.default_rng(SEED)
    weights = np.full((1, experts), 1 / experts, np.float32)
    return [Demand(rng.permutation(8)[None, :experts].astype(np.int32), weights, None) for _ in range(count)]


def layer_call(token: Any, demand: Any, ledger: Any, more: bool = False) -> Any:
    """For one request. Calls of commits before 0bc43de had its account alone, and before `more` all was booked at once.

    `more`: others follow, as in a pass.
    """
    from wdmoe import layer_call as calls

    if not hasattr(calls, "Callers"):
        return calls.LayerCall(0, token, demand, ledger)
    call = calls.LayerCall(0, token, demand, calls.Callers([calls.Caller(ledger)], [len(token)]))
    return dataclasses.replace(call, more=more) if hasattr(call, "more") else call


def pass_of_layers(station: Any, token: Any, asked: list[Any], ledger: Any) -> tuple[list[float], list[float]]:
    """Layers of one pass, on the model thread: seconds of each, and those in which its devices computed.

    One more layer ends the pass and is not counted: a layer may be booked in the next one.
    """
    booked, elapsed = [ledger.device_compute_s], []
    for demand in asked:
        begun = time.perf_counter()
        station.layers.run(layer_call(token, demand, ledger, more=True))
        elapsed.append(time.perf_counter() - begun)
        booked.append(ledger.device_compute_s)
    station.layers.run(layer_call(token, asked[0], ledger))
    late = booked[1] == booked[0]
    compute = np.diff([*booked, ledger.device_compute_s])[late : late + len(elapsed)]
    return elapsed, compute.tolist()


def time_layer(station: Any, echo: Echo, hidden: int, rounds: int, per_round: int) -> dict[str, list[list[float]]]:
    """Turns of echo and layer; seconds of each, by round."""
    from wdmoe.receipt import Ledger

    token, asked = one_token(hidden), demands(per_round)
    names = ("echo_s", "paused_echo_s", "layer_s", "compute_s", "overhead_s")
    figures: dict[str, list[list[float]]] = {name: [] for name in names}

    def turn(model: Any, ledger: Ledger) -> None:
        figures["echo_s"].append([echo.once() for _ in asked])
        elapsed, compute = pass_of_layers(station, token, asked, ledger)
        figures["layer_s"].append(elapsed)
        figures["compute_s"].append(compute)
        figures["overhead_s"].append(np.subtract(elapsed, compute).tolist())
        pause_s = float(np.median(compute))
        figures["paused_echo_s"].append([echo.once(pause_s) for _ in asked])

    for i in range(rounds + 1):
        station.engine.call(turn).result(600)
        if i == 0:  # the first turn warms up
            for values in figures.values():
                values.clear()
    return figures


if __name__ == "__main__":
    echo_server()
