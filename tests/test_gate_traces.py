"""Recorded gate traces: the file, and what is recorded from a real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from tests.test_split import write_tokenizer
from wdmoe.backbone.record_trace import record_trace
from wdmoe.backbone.trace_recorder import TraceRecorder
from wdmoe.errors import BundleError, ConfigError
from wdmoe.gate_trace import GateTrace


def a_trace(**changes: object) -> GateTrace:
    rng = np.random.default_rng(0)
    gate = rng.standard_normal((2, 6, 4)).astype(np.float16)
    fields: dict[str, object] = {
        "model": "m",
        "layers": np.array([1, 3], np.int32),
        "position": np.array([0, 1, 2, 0, 1, 2], np.int32),
        "gate": gate,
        "experts": np.argsort(-gate, axis=2)[..., :2].astype(np.int16),
        "weights": np.full((2, 6, 2), 0.5, np.float16),
    }
    return GateTrace(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("similarity", [None, np.zeros((2, 6), np.float16)])
def test_what_is_saved_is_loaded(tmp_path: Path, similarity: object) -> None:
    trace = a_trace(similarity=similarity, temperature=0.01)
    trace.save(tmp_path / "t.npz")
    again = GateTrace.load(tmp_path / "t.npz")
    for name in ("layers", "position", "gate", "experts", "weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    assert (again.model, again.temperature) == ("m", 0.01)
    assert (again.similarity is None) == (similarity is None)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gate": np.zeros((2, 6, 4))}, "gate must be float16"),
        ({"gate": np.full((2, 6, 4), np.nan, np.float16)}, "finite"),
        ({"experts": np.full((2, 6, 2), 4, np.int16)}, "from -1 to 3"),
        ({"weights": np.zeros((2, 6, 3), np.float16)}, "weights must have shape"),
        ({"layers": np.array([3, 1], np.int32)}, "ascend"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"position": np.full(6, -1, np.int32)}, "negative"),
        ({"gate": np.zeros((2, 0, 4), np.float16)}, "none empty"),
    ],
)
def test_a_contradiction_is_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        a_trace(**changes)


def test_files_that_are_no_traces_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "t.npz"

    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            GateTrace.load(file)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot be used" in refusal()  # not there
    file.write_bytes(b"no archive")
    assert "cannot be used" in refusal()
    np.savez(file, version=1)
    assert "lacks experts" in refusal()
    a_trace().save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refusal()
    with np.load(_saved(tmp_path, a_trace())) as arrays:
        held = dict(arrays)
    np.savez(file, **{**held, "version": np.int32(9)})
    assert "version 9" in refusal()
    np.savez(file, **{**held, "extra": np.int32(9)})
    assert "'extra'" in refusal()
    np.savez(file, **{**held, "gate": np.array([object()], dtype=object)})  # pickled: must not be loaded
    assert "allow_pickle" in refusal()


def _saved(folder: Path, trace: GateTrace) -> Path:
    trace.save(folder / "sound.npz")
    return folder / "sound.npz"


def test_frequencies_and_probabilities() -> None:
    trace = a_trace()
    assert np.allclose(trace.activation_frequency().sum(axis=1), 2)
    assert np.allclose(trace.probabilities().sum(axis=2), 1)
    sharp = a_trace(temperature=0.01)
    assert (sharp.probabilities().max(axis=2) >= trace.probabilities().max(axis=2)).all()


def test_recorded_is_what_the_routers_said(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.arange(12).view(2, 6)
    with TraceRecorder(model, "tiny", similarity=True) as recorder, torch.no_grad():
        said = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
    model(input_ids=ids)  # after leaving nothing is heard
    trace = recorder.trace()
    assert trace.tokens == 12
    assert trace.position.tolist() == [*range(6), *range(6)]
    np.testing.assert_allclose(trace.gate, torch.stack(said).numpy(), atol=2e-3)
    best = np.sort(np.argsort(-trace.gate.astype(float), axis=2)[..., :2], axis=2)
    assert (np.sort(trace.experts, axis=2) == best).mean() > 0.95  # float16 may make a tie
    assert np.allclose(trace.weights.sum(axis=2, dtype=np.float32), 1, atol=2e-3)
    assert trace.similarity is not None
    assert (trace.similarity[:, [0, 6]] == 0).all()
    assert (np.abs(trace.similarity) <= 1).all()


def test_decoding_with_a_cache_goes_on_counting_positions(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with TraceRecorder(model, "tiny") as recorder, torch.no_grad():
        first = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True)
        model(input_ids=torch.tensor([[4]]), past_key_values=first.past_key_values)
    assert recorder.trace().position.tolist() == [0, 1, 2, 3]


def test_nothing_recorded_is_said(checkpoint: Path) -> None:
    with TraceRecorder(AutoModelForCausalLM.from_pretrained(checkpoint), "tiny") as recorder:
        pass
    with pytest.raises(BundleError, match="did not run"):
        recorder.trace()


def test_a_checkpoint_reads_a_file(checkpoint: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{i % 50}" for i in range(100)))
    stages: list[str] = []
    trace = record_trace(str(checkpoint), (words,), 64, 32, False, lambda stage, _: stages.append(stage))
    assert (trace.gate.shape, trace.model) == ((2, 64, 4), checkpoint.name)
    assert {"load", "read"} == set(stages)
    with pytest.raises(ConfigError, match="at least one window"):
        record_trace(str(checkpoint), (words,), 8, 32, False, lambda *_: None)
    with pytest.raises(BundleError, match="no checkpoint"):
        record_trace(str(tmp_path), (words,), 64, 32, False, lambda *_: None)
