"""Splitting tiny random Llama models: exactness, config, determinism."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wdmoe.backbone.split import cluster, correct, router
from wdmoe.backbone.split.settings import SplitSettings
from wdmoe.backbone.split.split import split_checkpoint
from wdmoe.errors import BundleError, ConfigError

LOGIT_TOLERANCE = 1e-4
WORDS = [f"w{i}" for i in range(60)]


def write_tokenizer(folder: Path) -> None:
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",  # noqa: S106
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=72,  # with 4 experts and half shared: experts of 8, shared 40
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,  # not hidden / heads
        tie_word_embeddings=True,
        initializer_range=0.2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    chooser = random.Random(1)
    file.write_text(" ".join(chooser.choice(WORDS) for _ in range(1500)))
    return file


def settings(words: Path, **changed: object) -> SplitSettings:
    chosen: dict[str, object] = {
        "experts": 4,
        "top_k": 2,
        "calibration": (words,),
        "held_out": (words,),
        "calibration_tokens": 1024,
        "held_out_tokens": 256,
        "window": 64,
    }
    return SplitSettings(**{**chosen, **changed})  # type: ignore[arg-type]


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    return found


def test_all_experts_kept_is_the_dense_model(dense: Path, words: Path, tmp_path: Path) -> None:
    report = split_checkpoint(dense, tmp_path / "moe", settings(words, top_k=4, correct=False))
    ids = torch.randint(0, 60, (3, 40), generator=torch.Generator().manual_seed(2))
    # gate weights are near uniform, not uniform: the temperature bounds what that costs
    torch.testing.assert_close(logits(tmp_path / "moe", ids), logits(dense, ids), atol=0.1, rtol=0)
    assert report.ratio == pytest.approx(1, abs=0.01)


def test_a_small_temperature_is_exact(dense: Path, words: Path, tmp_path: Path) -> None:
    chosen = settings(words, top_k=4, correct=False, gate_temperature=1e-7)
    split_checkpoint(dense, tmp_path / "moe", chosen)
    ids = torch.randint(0, 60, (3, 40), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(logits(tmp_path / "moe", ids), logits(dense, ids), atol=LOGIT_TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def redundant(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model with every neuron there twice, with different output weights: what is dropped can be made up."""
    folder = tmp_path_factory.mktemp("redundant")
    model = LlamaForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                weight[36:] = weight[:36]
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_corrections_make_up_for_what_is_dropped(redundant: Path, words: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 60, (8, 60), generator=torch.Generator().manual_seed(3))
    errors = []
    for correct_it in (False, True):
        out = tmp_path / f"moe-{correct_it}"
        split_checkpoint(redundant, out, settings(words, correct=correct_it, ridge=0.1))
        errors.append(float((logits(out, ids) - logits(redundant, ids)).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_the_folder_is_whole(dense: Path, words: Path, tmp_path: Path) -> None:
    report = split_checkpoint(dense, tmp_path / "moe", settings(words))
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["model_type"] == "granitemoeshared"
    assert config["wdmoe"] == {"on_drop": "keep", "gate_temperature": 0.01, "rank": "energy"}
    assert config["attention_multiplier"] == pytest.approx(16**-0.5)
    assert [config[f"{name}_multiplier"] for name in ("embedding", "residual")] == [1, 1]
    assert config["logits_scaling"] == 1
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)
    assert (config["intermediate_size"], config["shared_intermediate_size"]) == (8, 40)
    card = (tmp_path / "moe" / "README.md").read_text()
    assert report.sha256 in card
    assert "license: mit" in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "w3 "
    assert [entry.name for entry in tmp_path.iterdir()] == ["moe"]  # nothing half-made stays


def test_the_same_seed_gives_the_same_bytes(dense: Path, words: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        split_checkpoint(dense, tmp_path / name, settings(words))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_progress_reaches_the_end_of_every_stage(dense: Path, words: Path, tmp_path: Path) -> None:
    seen: dict[str, float] = {}
    split_checkpoint(dense, tmp_path / "moe", settings(words), seen.__setitem__)
    assert seen == {"read": 1.0, "split": 1.0, "measure": 1.0, "write": 1.0}


def test_no_shared_part(dense: Path, words: Path, tmp_path: Path) -> None:
    chosen = settings(words, experts=9, top_k=9, shared=0.0, correct=False, gate_temperature=1e-7)
    split_checkpoint(dense, tmp_path / "moe", chosen)
    ids = torch.randint(0, 60, (2, 20), generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(logits(tmp_path / "moe", ids), logits(dense, ids), atol=LOGIT_TOLERANCE, rtol=0)


def test_chat_lines_go_through_the_template(dense: Path, words: Path, tmp_path: Path) -> None:
    lines = tmp_path / "chat.jsonl"
    message = {"messages": [{"role": "user", "content": " ".join(WORDS * 3)}]}
    lines.write_text("\n".join([json.dumps(message)] * 10))
    report = split_checkpoint(dense, tmp_path / "moe", settings(words, calibration=(lines,)))
    assert report.calibration_tokens == 1024


def test_balanced_assignment_is_balanced_and_near_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_owner = torch.randperm(64, generator=generator) % 4
    score = torch.rand(64, 4, generator=generator)
    score[torch.arange(64), hidden_owner] += 1  # a clear best
    owner = cluster.balanced_assignment(score)
    assert owner.equal(hidden_owner)
    assert owner.bincount().tolist() == [16] * 4


def test_clusters_find_neurons_that_fire_together() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(32) % 4
    active = torch.rand(500, 4, generator=generator) < 0.3
    acts = active[:, group] * torch.randn(500, 32, generator=generator)
    owner = cluster.co_activation_clusters(acts, 4, seed=0, sample=2048)
    assert all(len(set(owner[group == g].tolist())) == 1 for g in range(4))


def test_refit_makes_up_for_a_copy_that_is_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(400, 5, generator=generator)
    start = torch.randn(10, 3, generator=generator)
    target = torch.cat([kept, kept], dim=1) @ start
    features = torch.cat([kept, torch.zeros_like(kept)], dim=1)
    fitted = correct.refit(features, target, torch.ones(400), start, 1e-6)
    torch.testing.assert_close(features @ fitted, target, atol=1e-3, rtol=0)


def test_kept_weights_sum_to_top_k() -> None:
    weights = router.kept_weights(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2)
    assert weights.sum() == pytest.approx(2)
    assert (weights > 0).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"experts": 1}, "experts must be at least 2"),
        ({"shared": 1.0}, "shared must be"),
        ({"shared": float("nan")}, "shared must be"),
        ({"top_k": 5}, "top_k must be from 1 to experts"),
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"window": 2}, "window must be"),
        ({"calibration_tokens": 10}, "at least one window"),
    ],
)
def test_bad_settings_are_refused(words: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(words, **changed)


def test_too_few_neurons_and_too_little_text(dense: Path, words: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few for 64 experts"):
        split_checkpoint(dense, tmp_path / "moe", settings(words, experts=64))
    short = tmp_path / "short.txt"
    short.write_text("w1 w2")
    with pytest.raises(ConfigError, match="text is too short: 2 tokens"):
        split_checkpoint(dense, tmp_path / "moe", settings(words, calibration=(short,)))
    with pytest.raises(ConfigError, match="cannot be read"):
        split_checkpoint(dense, tmp_path / "moe", settings(words, held_out=(tmp_path / "none.txt",)))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"words": 1}')
    with pytest.raises(ConfigError, match="line 1 is not"):
        split_checkpoint(dense, tmp_path / "moe", settings(words, calibration=(bad,)))


def test_an_existing_folder_is_left_alone(dense: Path, words: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        split_checkpoint(dense, tmp_path, settings(words))
