"""Recorded gate traces: the file, and what is recorded from a real model."""

from __future__ import annotations

import contextvars
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from tests.backbone.test_split import write_tokenizer
from wdmoe.backbone.evaluation.trace_recorder import TraceRecorder
from wdmoe.backbone.record_trace import record_trace
from wdmoe.errors import BundleError, ConfigError
from wdmoe.results.gate_trace import GateTrace
from wdmoe.simulation.scenario_file import shipped_trace


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
@pytest.mark.parametrize("alike", [None, np.ones((2, 4, 4), np.float16)])
def test_what_is_saved_is_loaded(tmp_path: Path, similarity: object, alike: object) -> None:
    trace = a_trace(similarity=similarity, expert_similarity=alike, temperature=0.01)
    trace.save(tmp_path / "t.npz")
    again = GateTrace.load(tmp_path / "t.npz")
    for name in ("layers", "position", "gate", "experts", "weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    assert (again.model, again.temperature) == ("m", 0.01)
    assert (again.similarity is None) == (similarity is None)
    assert (again.expert_similarity is None) == (alike is None)
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
        ({"expert_similarity": np.zeros((2, 4, 3), np.float16)}, "expert_similarity must have shape"),
        ({"expert_similarity": np.full((2, 4, 4), 2, np.float16)}, "expert_similarity must be from -1 to 1"),
        ({"similarity": np.full((2, 6), np.nan, np.float16)}, "similarity must be from -1 to 1"),
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


def test_sequences_stand_together_however_their_passes_take_turns(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    first, second = contextvars.copy_context(), contextvars.copy_context()

    @torch.no_grad()
    def ask(ids: list[int], cache: object = None) -> object:
        return model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).past_key_values

    with TraceRecorder(model, "turns", similarity=True) as recorder:
        a = first.run(ask, [1, 2, 3])
        b = second.run(ask, [7, 8])
        first.run(ask, [4], a)
        second.run(ask, [9], b)
    with TraceRecorder(model, "whole", similarity=True) as alone:
        first.run(ask, [1, 2, 3, 4])
        second.run(ask, [7, 8, 9])
    turns, whole = recorder.trace(), alone.trace()
    assert turns.position.tolist() == whole.position.tolist() == [0, 1, 2, 3, 0, 1, 2]
    np.testing.assert_allclose(turns.gate, whole.gate, atol=2e-3)
    assert turns.similarity is not None
    assert whole.similarity is not None
    np.testing.assert_allclose(turns.similarity, whole.similarity, atol=2e-3)


def test_a_pass_that_broke_off_is_left_out_and_the_limit_holds(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    last = model.model.layers[1]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with TraceRecorder(model, "tiny", most_tokens=4) as recorder, torch.no_grad():
        handle = last.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=torch.tensor([[1, 2]]))
        handle.remove()
        model(input_ids=torch.tensor([[1, 2, 3]]))
        model(input_ids=torch.tensor([[1, 2, 3]]))  # beyond the limit
    assert recorder.trace().tokens == 3


def test_how_alike_experts_are(checkpoint: Path) -> None:
    """Against the definition, token by token; expert 3 is made twice expert 1."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[3] = experts.gate_up_proj[1]
        experts.down_proj[3] = 2 * experts.down_proj[1]
    seen: list[tuple[torch.Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    with TraceRecorder(model, "tiny", expert_similarity=True) as recorder, torch.no_grad():
        model(input_ids=torch.arange(40).view(2, 20))
        model(input_ids=torch.arange(20, 50).view(1, 30))
    handle.remove()
    alike = recorder.trace().expert_similarity
    assert alike is not None
    assert alike.shape == (2, 4, 4)
    assert np.all(alike.diagonal(axis1=1, axis2=2) == 1)
    assert alike[0, 1, 3] == alike[0, 3, 1] == 1
    with torch.no_grad():
        inner, square = torch.zeros(4, 4), torch.zeros(4, 4)
        for hidden, chosen, weights in seen:
            for token, picks, gates in zip(hidden, chosen.tolist(), weights, strict=True):
                outputs = torch.stack([_one_expert(experts, token, expert) for expert in range(4)])
                for i, gate in zip(picks, gates, strict=True):
                    inner[i] += gate**2 * (outputs @ outputs[i])
                    square[i] += gate**2 * outputs.square().sum(1)
        want = inner / (square.diagonal()[:, None] * square).sqrt()
    np.testing.assert_allclose(alike[0], want, atol=2e-3)


def _one_expert(experts: torch.nn.Module, token: torch.Tensor, expert: int) -> torch.Tensor:
    gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
    out: torch.Tensor = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
    return out


def test_without_the_weights_similarity_is_refused(checkpoint: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig.from_pretrained(checkpoint))
    with pytest.raises(BundleError, match="needs the experts' weights"):
        TraceRecorder(model, "tiny", expert_similarity=True)


def test_nothing_recorded_is_said(checkpoint: Path) -> None:
    with TraceRecorder(AutoModelForCausalLM.from_pretrained(checkpoint), "tiny") as recorder:
        pass
    with pytest.raises(BundleError, match="did not run"):
        recorder.trace()


def test_a_checkpoint_reads_a_file(checkpoint: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{i % 50}" for i in range(100)))
    stages: list[str] = []
    trace = record_trace(checkpoint, (words,), 64, 32, False, lambda stage, _: stages.append(stage))
    assert (trace.gate.shape, trace.model) == ((2, 64, 4), checkpoint.name)
    assert {"load", "read"} == set(stages)
    with pytest.raises(ConfigError, match="at least one window"):
        record_trace(checkpoint, (words,), 8, 32, False, lambda *_: None)
    with pytest.raises(BundleError, match="no checkpoint"):
        record_trace(tmp_path, (words,), 64, 32, False, lambda *_: None)


def test_the_shipped_trace_is_whole_and_is_the_one_described() -> None:
    file = shipped_trace()
    trace = GateTrace.load(file)
    assert trace.gate.shape == (30, 1792, 8)
    assert trace.experts.shape[2] == 4
    assert np.flatnonzero(trace.position == 0).tolist() == list(range(0, 1792, 256))
    assert trace.similarity is not None
    assert trace.expert_similarity is not None
    assert file.stat().st_size < 1 << 20
    assert hashlib.sha256(file.read_bytes()).hexdigest() in file.with_name("README.md").read_text()
