"""Decisions: the file is checked, and applying one gives the same bytes on any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.backbone.tiny import dense_folder
from wdmoe.backbone.split.applied import split_settings
from wdmoe.backbone.split.decided import apply_decisions
from wdmoe.backbone.split.decisions import (
    MAX_RANK,
    Correction,
    Decisions,
    decisions_bytes,
    parse_decisions,
)
from wdmoe.backbone.split.dense import DenseModel, read_dense
from wdmoe.errors import BundleError

# A corrected matrix, by hash. The dense one is a ramp, so that no installed model is needed.
HASH_OF_A_CORRECTED_MATRIX = """
import hashlib, numpy as np
from wdmoe.backbone.split.decisions import Correction
rng = np.random.default_rng(0)
whole = lambda *shape: rng.integers(-128, 128, shape).astype(np.int8)
a, b = whole(1024, 576), whole(1536, 1024)
scale = lambda n: np.linspace(1e-4, 3e-4, n, dtype=np.float32)
weight = np.linspace(-1, 1, 1536 * 576, dtype=np.float32).reshape(1536, 576)
made = Correction(a=a, b=b, row_scale=scale(1536), column_scale=scale(576)).added_to(weight)
print(hashlib.sha256(made.tobytes()).hexdigest())
"""
ITS_HASH = "99bacc032495489f0cb5e0ff440320aed173f72c174138054edd376e272efa38"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return read_dense(dense_folder(tmp_path_factory.mktemp("models") / "dense"))


@pytest.fixture
def decisions(source: DenseModel, rng: np.random.Generator) -> Decisions:
    """Random ones for the tiny model, with all parts; only `gate` and `q` are corrected."""
    assignment = np.full((2, 72), 4, np.uint8)
    assignment[:, :32] = rng.permutation(np.repeat(np.arange(4), 8)).astype(np.uint8)
    tensors: dict[str, Any] = {"assignment": assignment, "router": rng.normal(size=(2, 4, 32)).astype(np.float32)}
    for name, shape in {
        "neuron_scale": (2, 72),
        "input_norm": (2, 32),
        "ffn_norm": (2, 32),
        "final_norm": (32,),
    }.items():
        tensors[name] = rng.normal(size=shape).astype(np.float32)
    for matrix, rows in {"gate": 72, "q": 64}.items():
        tensors[f"{matrix}.a"] = rng.integers(-127, 128, (2, 3, 32)).astype(np.int8)
        tensors[f"{matrix}.b"] = rng.integers(-127, 128, (2, rows, 3)).astype(np.int8)
        tensors[f"{matrix}.row_scale"] = rng.random((2, rows)).astype(np.float32)
        tensors[f"{matrix}.column_scale"] = rng.random((2, 32)).astype(np.float32)
    return Decisions(
        source_sha256=source.sha256, experts=4, top_k=2, gate_temperature=0.01, figures={"a": "b"}, tensors=tensors
    )


def test_what_is_written_is_read(decisions: Decisions) -> None:
    data = decisions_bytes(decisions)
    read = parse_decisions(data)
    assert decisions_bytes(read) == data
    assert read.corrected == ("gate", "q")
    assert (read.experts, read.top_k, read.gate_temperature, read.figures) == (4, 2, 0.01, {"a": "b"})
    assert len(read.digest) == 64
    for name, tensor in decisions.tensors.items():
        assert np.array_equal(read.tensors[name], tensor)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x02\0\0\0\0\0\0\0{}"])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="not a file of decisions"):
        parse_decisions(data)


def test_a_file_of_a_later_format_is_refused(decisions: Decisions) -> None:
    data = decisions_bytes(decisions).replace(b'\\"format\\": 1', b'\\"format\\": 2')
    with pytest.raises(BundleError, match="of format 2, this wdmoe reads 1"):
        parse_decisions(data)


def _wrong(name: str, change: Callable[[Any], Any]) -> Any:
    return pytest.param(name, change, id=name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        _wrong("assignment", lambda t: np.zeros_like(t)),
        _wrong("assignment", lambda t: t + 5),
        _wrong("assignment", lambda t: t.astype(np.int32)),
        _wrong("router", lambda t: t[:, :3]),
        _wrong("router", lambda t: t * np.nan),
        _wrong("neuron_scale", lambda t: t[:, :3]),
        _wrong("gate.a", lambda t: t.astype(np.int16)),
        _wrong("gate.b", lambda t: t[:1]),
        _wrong("q.row_scale", lambda t: t * np.inf),
        _wrong("q.column_scale", lambda t: None),
        _wrong("gate.a", lambda t: np.zeros((2, MAX_RANK + 1, 32), np.int8)),
    ],
)
def test_parts_that_do_not_fit_are_refused(decisions: Decisions, name: str, change: Callable[[Any], Any]) -> None:
    value = change(decisions.tensors[name])
    tensors = {key: tensor for key, tensor in {**decisions.tensors, name: value}.items() if tensor is not None}
    with pytest.raises(BundleError, match="decisions are damaged"):
        decisions_bytes(replace(decisions, tensors=tensors))


def test_they_are_about_one_model(source: DenseModel, decisions: Decisions) -> None:
    with pytest.raises(BundleError, match="about a file with SHA-256 abc"):
        apply_decisions(source, replace(decisions, source_sha256="abc"))
    fewer = {name: tensor[:1] for name, tensor in decisions.tensors.items() if name != "final_norm"}
    with pytest.raises(BundleError, match=r"about \(1, 72, 32\) layers, neurons and width"):
        apply_decisions(source, replace(decisions, tensors=fewer))


def test_what_is_not_decided_stays(source: DenseModel, decisions: Decisions) -> None:
    before = {name: weight.clone() for name, weight in source.weights.items()}
    changed, layers = apply_decisions(source, decisions)
    assert all(torch.equal(source.weights[name], weight) for name, weight in before.items())
    assert not torch.equal(
        changed.weights["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )
    assert changed.weights["model.embed_tokens.weight"] is source.weights["model.embed_tokens.weight"]
    assert layers[0].gate_up.shape == (4, 16, 32)
    assert split_settings(72, decisions).expert_size(72) == 8
    bare, layers = apply_decisions(source, decisions.without_corrections())
    assert all(torch.equal(bare.weights[name], weight) for name, weight in before.items())
    owners = torch.from_numpy(decisions.tensors["assignment"][1].astype(np.int64))
    gate = before["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(layers[1].shared_gate_up[:40], gate[owners == 4])
    assert torch.equal(layers[1].gate_up[2, :8], gate[owners == 2])
    down = before["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(layers[1].down[2], 2 * down[:, owners == 2])


def test_the_largest_sums_are_exact() -> None:
    size = MAX_RANK
    extreme = np.full((size, 4), -128, np.int8)
    scale = np.ones(4, np.float32)
    made = Correction(a=extreme, b=extreme.T.copy(), row_scale=scale, column_scale=scale).added_to(
        np.zeros((4, 4), np.float32)
    )
    assert (made == 2**24).all()
    almost = extreme.copy()
    almost[0] = 127  # an odd sum next to the limit
    made = Correction(a=almost, b=extreme.T.copy(), row_scale=scale, column_scale=scale).added_to(
        np.zeros((4, 4), np.float32)
    )
    assert (made.astype(np.int64) == (size - 1) * 128**2 - 127 * 128).all()


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_corrected_matrix_is_the_same_on_any_number_of_threads(threads: str, repository: Path) -> None:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, threads), "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", HASH_OF_A_CORRECTED_MATRIX]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    assert said.stdout.strip() == ITS_HASH
