"""Distilling a tiny random split model: it learns, goes on after an interruption, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.backbone.test_split import WORDS, write_tokenizer
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.split.distil import DistilSettings, distil_checkpoint
from wdmoe.backbone.split.distil_training import Training
from wdmoe.backbone.split.settings import SplitSettings
from wdmoe.backbone.split.split import split_checkpoint
from wdmoe.errors import BundleError, ConfigError

STEPS = 20


class StopError(Exception):
    """Stands for Ctrl-C or a crash."""


def words(file: Path, seed: int, count: int = 1200) -> Path:
    chooser = random.Random(seed)
    file.write_text(" ".join(chooser.choice(WORDS) for _ in range(count)))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, the same split, text to train on and text to measure on."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    write_tokenizer(folder / "dense")
    seen, held_out = words(folder / "seen.txt", 1), words(folder / "held_out.txt", 2)
    chosen = SplitSettings(
        experts=4,
        top_k=2,
        calibration=(seen,),
        held_out=(held_out,),
        calibration_tokens=512,
        held_out_tokens=512,
        window=64,
        correct=False,
    )
    split_checkpoint(folder / "dense", folder / "moe", chosen)
    return folder


def settings(folder: Path, **changed: object) -> DistilSettings:
    chosen: dict[str, object] = {"steps": STEPS, "batch": 4, "window": 32, "learning_rate": 3e-3, "save_every": 8}
    return DistilSettings(
        training=Training(**{**chosen, **changed}),  # type: ignore[arg-type]
        text=(folder / "seen.txt",),
        held_out=(folder / "held_out.txt",),
        held_out_tokens=512,
        held_out_window=64,
        device="cpu",
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed_parts(before: Path, after: Path) -> set[str]:
    """Which parameters differ, by name without the layer's number."""
    old, new = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (before, after))
    return {name.split(".", 3)[-1] for name in old if not old[name].equal(new[name])}


def test_the_loss_falls_and_the_result_is_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    seen: dict[str, float] = {}
    report = distil_checkpoint(folder / "dense", folder / "moe", tmp_path / "out", settings(folder), seen.__setitem__)
    assert report.steps == STEPS
    assert report.last_loss < 0.8 * report.first_loss
    assert report.dense_perplexity != report.before_perplexity != report.after_perplexity
    assert set(seen.values()) == {1.0} or all(stage.startswith("train") for stage, x in seen.items() if x < 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{report.after_perplexity:.4f}" in card

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.wdmoe == AutoModelForCausalLM.from_pretrained(folder / "moe").config.wdmoe
    bundle = export_bundle(tmp_path / "out", tmp_path / "bundle", ExportSettings())
    assert len(bundle.experts) == 8


def test_a_resumed_run_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    def stop_late(stage: str, done: float) -> None:
        if stage.startswith("train") and done > 0.7:
            raise StopError

    chosen = settings(folder)
    distil_checkpoint(folder / "dense", folder / "moe", tmp_path / "whole", chosen)
    with pytest.raises(StopError):
        distil_checkpoint(folder / "dense", folder / "moe", tmp_path / "parts", chosen, stop_late)
    assert [path.name for path in tmp_path.glob("parts*")] == ["parts.training"]
    stages: dict[str, float] = {}
    report = distil_checkpoint(folder / "dense", folder / "moe", tmp_path / "parts", chosen, stages.setdefault)  # type: ignore[arg-type]
    first_step = next(done for stage, done in stages.items() if stage.startswith("train"))
    assert first_step == 9 / STEPS
    assert report.steps == STEPS
    assert changed_parts(tmp_path / "whole", tmp_path / "parts") == set()
    assert [path.name for path in tmp_path.glob("parts*")] == ["parts"]


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ("router", {"router"}),
        ("experts", {"router", "experts"}),
        ("all", {"router", "experts", "shared_mlp"}),
    ],
)
def test_only_what_is_asked_for_is_trained(folder: Path, tmp_path: Path, train: str, parts: set[str]) -> None:
    distil_checkpoint(folder / "dense", folder / "moe", tmp_path / "out", settings(folder, train=train, steps=3))
    changed = changed_parts(folder / "moe", tmp_path / "out")
    assert changed
    for name in changed:
        assert any(part in name for part in parts)
    assert all(any(part in name for name in changed) for part in parts)


def test_a_batch_is_the_same_at_once_and_in_pieces(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil_checkpoint(folder / "dense", folder / "moe", tmp_path / "whole", settings(folder, steps=1))
    monkeypatch.setattr("wdmoe.backbone.split.distil_training._TOKENS_AT_ONCE", 32)
    distil_checkpoint(folder / "dense", folder / "moe", tmp_path / "pieces", settings(folder, steps=1))
    whole, pieces = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    for name in whole:  # Adam's first step is the sign of the gradient: a sum in another order may flip a tiny one
        assert (whole[name] - pieces[name]).abs().gt(1e-4).float().mean() < 0.01


def test_a_file_of_another_run_is_left_alone(folder: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: float) -> None:
        if stage.startswith("train") and done >= 0.5:
            raise StopError

    with pytest.raises(StopError):
        distil_checkpoint(folder / "dense", folder / "moe", tmp_path / "out", settings(folder), stop)
    with pytest.raises(ConfigError, match="other models, text or settings"):
        distil_checkpoint(folder / "dense", folder / "moe", tmp_path / "out", settings(folder, seed=1))
    (tmp_path / "out.training").write_bytes(b"\x80\x04garbage")
    with pytest.raises(ConfigError, match=r"out\.training cannot be read"):
        distil_checkpoint(folder / "dense", folder / "moe", tmp_path / "out", settings(folder))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": "attention"}, "train must be one of router, experts, all"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"window": 2}, "window must be at least 8"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"warm_up": 1.0}, "warm_up must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_settings_are_refused(folder: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(folder, **changed)


def test_held_out_text_must_be_other_text(folder: Path, tmp_path: Path) -> None:
    chosen = settings(folder)
    with pytest.raises(ConfigError, match="must be other text"):
        dataclasses.replace(chosen, held_out=chosen.text)
    copy = tmp_path / "copy.txt"
    copy.write_text("w1 w2 w3 " + (folder / "seen.txt").read_text())  # also out of step with the windows
    with pytest.raises(ConfigError, match="pieces of the held-out text are in the training text"):
        distil_checkpoint(
            folder / "dense", folder / "moe", tmp_path / "out", dataclasses.replace(chosen, held_out=(copy,))
        )


def test_models_that_do_not_belong_together(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="'llama' model, not the granitemoeshared"):
        distil_checkpoint(folder / "dense", folder / "dense", tmp_path / "out", settings(folder))
    with pytest.raises(BundleError, match="no readable config"):
        distil_checkpoint(folder / "dense", tmp_path / "none", tmp_path / "out", settings(folder))
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    write_tokenizer(tmp_path / "other")
    with pytest.raises(BundleError, match="its hidden_size is 32, the dense model's 16"):
        distil_checkpoint(tmp_path / "other", folder / "moe", tmp_path / "out", settings(folder))
    with pytest.raises(BundleError, match="exists already"):
        distil_checkpoint(folder / "dense", folder / "moe", tmp_path, settings(folder))


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "moe", tmp_path / "moe")
    (tmp_path / "moe" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(BundleError, match=r"moe has no tensor|moe cannot be read"):
        distil_checkpoint(folder / "dense", tmp_path / "moe", tmp_path / "out", settings(folder))


@pytest.mark.slow
def test_the_tool(folder: Path, tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "tools" / "study" / "distil"), str(tmp_path / "out")]
    command += ["--dense", str(folder / "dense"), "--moe", str(folder / "moe"), "--device", "cpu"]
    command += ["--text", str(folder / "seen.txt"), "--held-out", str(folder / "held_out.txt")]
    command += ["--steps", "2", "--window", "32", "--held-out-tokens", "512", "--json", str(tmp_path / "figures.json")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert "times dense" in made.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["steps"] == 2
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert again.stderr == f"error: {tmp_path / 'out'} exists already; give a new folder\n"
