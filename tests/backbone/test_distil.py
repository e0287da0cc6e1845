"""Distilling a tiny random model: it learns, goes on after an interruption, and what comes out is what was trained."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.backbone.tiny import RANKS, STEPS, dense_folder, tiny_settings, words
from wdmoe.backbone.distil.distil import DistilReport, DistilSettings, distil
from wdmoe.backbone.distil.loss import divergence
from wdmoe.backbone.distil.low_rank import eight_bits
from wdmoe.backbone.distil.student import Cut, FastLlama, trainable
from wdmoe.backbone.distil.training import Training
from wdmoe.backbone.split.calibrate import dense_model
from wdmoe.backbone.split.checkpoint import moe_model
from wdmoe.backbone.split.decided import apply_decisions
from wdmoe.backbone.split.decisions import Decisions, decisions_bytes
from wdmoe.backbone.split.dense import DenseModel, Weights, read_dense
from wdmoe.errors import ConfigError

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, text to train on and text to measure on."""
    folder = tmp_path_factory.mktemp("models")
    dense_folder(folder / "dense")
    words(folder / "seen.txt", 1)
    words(folder / "held_out.txt", 2)
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> DenseModel:
    return read_dense(folder / "dense")


def distilled(folder: Path, state: Path, chosen: DistilSettings | None = None) -> tuple[Decisions, DistilReport]:
    done = distil(folder / "dense", state, chosen or tiny_settings(folder))
    assert done is not None
    return done


def some_ids(count: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 61, (count, length), generator=torch.Generator().manual_seed(1))


def random_cut(source: DenseModel) -> Cut:
    chooser = torch.Generator().manual_seed(2)
    places = torch.randperm(72, generator=chooser)
    owners = torch.full((2, 72), 4)
    owners[:, places[:32]] = torch.arange(4).repeat_interleave(8)
    return Cut(owners, 0.01 * torch.randn(2, 4, 32, generator=chooser), 2)


def whole_changes(source: DenseModel) -> tuple[Weights, dict[str, np.ndarray]]:
    """Random changes whose factors are small whole numbers, as the student takes them and as decisions hold them."""
    chooser = torch.Generator().manual_seed(3)
    weights = trainable(source, RANKS, 0)
    for name in weights:
        if name.endswith((".a", ".b")):
            weights[name] = torch.randint(-3, 4, weights[name].shape, generator=chooser).float() / 32
        else:
            weights[name] = weights[name] + 0.1 * torch.randn(weights[name].shape, generator=chooser)
    tensors: dict[str, np.ndarray] = {"final_norm": weights["final_norm"].numpy()}
    for name in ("input_norm", "ffn_norm", "neuron_scale"):
        tensors[name] = torch.stack([weights[f"{layer}.{name}"] for layer in range(2)]).numpy()
    for matrix in RANKS:
        pairs = [[weights[f"{layer}.{matrix}.{part}"] * 32 for layer in range(2)] for part in ("a", "b")]
        a, b = (torch.stack(pair).to(torch.int8) for pair in pairs)
        tensors[f"{matrix}.a"], tensors[f"{matrix}.b"] = a.numpy(), b.numpy()
        tensors[f"{matrix}.row_scale"] = np.full(b.shape[:2], 1 / 32, np.float32)
        tensors[f"{matrix}.column_scale"] = np.full((2, a.shape[2]), 1 / 32, np.float32)
    return weights, tensors


@torch.no_grad()
def test_the_fast_model_computes_what_transformers_does(source: DenseModel) -> None:
    ids = some_ids()
    model = FastLlama(source, torch.float32)
    read = model.read(ids, {}, None, keep=True)
    wanted = dense_model(source)(ids, output_hidden_states=True)
    torch.testing.assert_close(read.hidden @ model.head.T, wanted.logits, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(read.streams[0], wanted.hidden_states[1], atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_the_student_computes_what_is_made_of_its_decisions(source: DenseModel, folder: Path) -> None:
    ids, cut = some_ids(), random_cut(source)
    weights, tensors = whole_changes(source)
    decisions = Decisions(
        source_sha256=source.sha256,
        experts=4,
        top_k=2,
        gate_temperature=0.01,
        figures={},
        tensors={**tensors, "assignment": cut.owners.to(torch.uint8).numpy(), "router": cut.routers.numpy()},
    )
    model = FastLlama(source, torch.float32)
    given = model.read(ids, weights, cut, keep=False).hidden @ model.head.T
    made = moe_model(*apply_decisions(source, decisions), tiny_settings(folder).split)
    torch.testing.assert_close(given, made(ids).logits, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_written_out_gradient_is_autograds() -> None:
    chooser = torch.Generator().manual_seed(0)
    given, wanted = torch.randn(300, 8, generator=chooser), torch.randn(300, 8, generator=chooser)
    head = torch.randn(40, 8, generator=chooser) / 2
    leaf = given.clone().requires_grad_(True)
    logs = ((leaf @ head.T).log_softmax(1), (wanted @ head.T).log_softmax(1))
    loss = torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True)
    loss.backward()
    value, gradient = divergence(given, wanted, head, value=True)
    assert value == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.testing.assert_close(gradient, leaf.grad, atol=1e-4, rtol=1e-3)
    assert torch.equal(divergence(given, wanted, head, value=False)[1], gradient)


def test_eight_bits_cost_about_a_percent() -> None:
    chooser = torch.Generator().manual_seed(0)
    strength = torch.logspace(0, -2, 16)  # components of very different size, as training leaves them
    a, b = strength[:, None] * torch.randn(16, 90, generator=chooser), torch.randn(70, 16, generator=chooser)
    found = eight_bits(a, b)
    product = found["row_scale"][:, None] * (found["b"].float() @ found["a"].float()) * found["column_scale"]
    assert (product - b @ a).norm() < 0.015 * (b @ a).norm()
    assert {found[name].dtype for name in ("a", "b")} == {torch.int8}
    zero = eight_bits(torch.zeros(4, 6), torch.zeros(5, 4))
    assert all(torch.isfinite(part).all() for part in zero.values())


def test_it_comes_nearer_to_the_dense_model(folder: Path, tmp_path: Path) -> None:
    stages: dict[str, float] = {}
    chosen = dataclasses.replace(tiny_settings(folder, steps=40), also={"more": folder / "held_out.txt"})
    done = distil(folder / "dense", tmp_path / "state", chosen, stages.__setitem__)
    assert done is not None
    _, report = done
    assert report.steps == 40
    assert report.trained_tokens == 40 * 64
    assert [point["step"] for point in report.curve] == list(range(0, 45, 5))
    dense = report.measured["held out"].dense
    assert report.curve[-1]["perplexity"] - dense < 0.8 * (report.curve[0]["perplexity"] - dense)
    assert report.measured["more"] == report.measured["held out"]
    assert report.measured["held out"].tokens == 512
    # in eight bits and through transformers it is what was trained
    assert report.measured["held out"].split == pytest.approx(report.curve[-1]["perplexity"], rel=0.02)
    assert {"read", "cut", "measure"} < stages.keys()
    json.dumps(report.as_json())


def test_a_resumed_run_gives_the_same_decisions(folder: Path, tmp_path: Path) -> None:
    whole, _ = distilled(folder, tmp_path / "whole")
    asked = iter([False] * 7 + [True])
    assert distil(folder / "dense", tmp_path / "parts", tiny_settings(folder), stop=lambda: next(asked)) is None
    longer = tiny_settings(folder, steps=STEPS + 1)  # while the rate is level, that changes nothing yet
    assert distil(folder / "dense", tmp_path / "parts", longer, stop=lambda: True) is None
    parts, report = distilled(folder, tmp_path / "parts")
    assert report.steps == STEPS
    assert decisions_bytes(parts) == decisions_bytes(whole)


def test_without_steps_it_is_the_cut_with_a_first_correction(folder: Path, tmp_path: Path) -> None:
    decisions, report = distilled(folder, tmp_path / "state", tiny_settings(folder, steps=0))
    assert [point["step"] for point in report.curve] == [0]
    assert not decisions.tensors["gate.b"].any()
    assert decisions.tensors["down.b"].any()
    assert (decisions.tensors["neuron_scale"] == 1).all()


def test_a_file_of_another_run_is_left_alone(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert distil(folder / "dense", state, tiny_settings(folder), stop=lambda: True) is None
    before = state.read_bytes()
    with pytest.raises(ConfigError, match="another model, text or settings"):
        distil(folder / "dense", state, tiny_settings(folder, seed=1))
    assert state.read_bytes() == before
    state.write_bytes(b"\x80\x04garbage")
    with pytest.raises(ConfigError, match=r"state cannot be read; delete it"):
        distil(folder / "dense", state, tiny_settings(folder))
    state.unlink()
    state.mkdir()  # what cannot be opened is not called damaged
    with pytest.raises(ConfigError, match=r"state cannot be read: "):
        distil(folder / "dense", state, tiny_settings(folder))


def test_a_rate_that_is_too_high_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a smaller learning rate"):
        distilled(folder, tmp_path / "state", tiny_settings(folder, learning_rate=1e30, warm_up=0))


def test_the_rate_rises_stays_and_falls() -> None:
    how = Training(steps=100, warm_up=9, decay=0.2)
    assert [how.rate(step) for step in (0, 4, 9, 80)] == [0.1, 0.5, 1.0, 1.0]
    assert how.rate(90) == 0.5
    assert how.rate(99) == pytest.approx(0.05)
    assert Training(stream_weight=0.4, stream_steps=10).stream_share(5) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": -1}, "steps must be at least 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"window": 2}, "window must be at least 8"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"warm_up": -1}, "warm_up must be at least 0"),
        ({"decay": 2.0}, "decay must be from 0 to 1"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_settings_are_refused(folder: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_settings(folder, **changed)


def test_bad_ranks_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no matrix 'gates'"):
        dataclasses.replace(tiny_settings(folder), ranks={"gates": 3})
    with pytest.raises(ConfigError, match="curve_every"):
        dataclasses.replace(tiny_settings(folder), curve_every=0)


def test_held_out_text_must_be_other_text(folder: Path, tmp_path: Path) -> None:
    chosen = tiny_settings(folder)
    with pytest.raises(ConfigError, match="must be other text"):
        dataclasses.replace(chosen, held_out=chosen.text)
    copy = tmp_path / "copy.txt"
    copy.write_text("w1 w2 w3 " + (folder / "seen.txt").read_text())  # also out of step with the windows
    with pytest.raises(ConfigError, match="pieces of the held-out text are in the training text"):
        distilled(folder, tmp_path / "state", dataclasses.replace(chosen, held_out=(copy,)))


@pytest.mark.slow
def test_the_tool(folder: Path, tmp_path: Path, repository: Path) -> None:
    out = tmp_path / "out.safetensors"
    command = [sys.executable, str(repository / "tools" / "study" / "distil"), str(out)]
    command += ["--dense", str(folder / "dense"), "--experts", "4", "--top-k", "2"]
    command += ["--checkpoint", str(tmp_path / "moe")]
    command += ["--text", str(folder / "seen.txt"), "--held-out", str(folder / "held_out.txt")]
    command += ["--steps", "2", "--window", "32", "--held-out-tokens", "512", "--json", str(tmp_path / "figures.json")]
    command += ["--plot", str(tmp_path / "curve.svg")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert "times dense" in made.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["steps"] == 2
    assert out.is_file()
    assert (tmp_path / "moe" / "config.json").is_file()
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert again.stderr == f"error: {out} exists already; give a new file\n"
