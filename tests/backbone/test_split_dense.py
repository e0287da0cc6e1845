"""Dense checkpoints that cannot be split are refused with one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.backbone.test_split import write_tokenizer
from wdmoe.backbone.split.dense import read_dense
from wdmoe.errors import BundleError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense", max_shard_size="5KB")
    write_tokenizer(tmp_path / "dense")
    return tmp_path / "dense"


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_sharded_files_are_read(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = read_dense(folder)
    original = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert found.weights.keys() == original.keys()
    for name, tensor in original.items():
        torch.testing.assert_close(found.weights[name], tensor, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "cannot split a 'gpt2' model"),
        ({"attention_bias": True}, "has biases"),
        ({"hidden_act": "gelu"}, "another activation"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding attention window"),
        ({"intermediate_size": 48}, "the config asks for"),
        ({"num_hidden_layers": 2}, "has no tensor model.layers.1"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(folder: Path, fields: dict[str, object], message: str) -> None:
    change_config(folder, **fields)
    with pytest.raises(BundleError, match=message):
        read_dense(folder)


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="neither a model folder nor a GGUF file"):
        read_dense(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"no readable config\.json"):
        read_dense(tmp_path / "empty")
    shutil.copy(folder / "config.json", tmp_path / "empty")
    with pytest.raises(BundleError, match=r"no \*\.safetensors"):
        read_dense(tmp_path / "empty")
    file = sorted(folder.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match="cannot be read"):
        read_dense(folder)


def test_numbers_that_are_not_finite_are_refused(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BundleError, match="not finite"):
        read_dense(folder)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    for content in (b"", b"hello", b"GGUF" + bytes(100)):
        file.write_bytes(content)
        with pytest.raises(BundleError, match=r"model\.gguf"):
            read_dense(file)
