"""Tiny random models and text for the tests of split and distillation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.backbone.test_split import WORDS, write_tokenizer
from wdmoe.backbone.distil.distil import DistilSettings
from wdmoe.backbone.distil.training import Training
from wdmoe.backbone.split.settings import SplitSettings

STEPS = 12
RANKS = {"gate": 4, "up": 4, "down": 8, "q": 4, "k": 4, "v": 4, "o": 4}


def words(file: Path, seed: int, count: int = 1200) -> Path:
    chooser = random.Random(seed)
    file.write_text(" ".join(chooser.choice(WORDS) for _ in range(count)))
    return file


def dense_folder(folder: Path, **changed: Any) -> Path:
    """A Llama model of two layers as a checkpoint folder."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    LlamaForCausalLM(LlamaConfig(**{**shape, **changed})).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def tiny_settings(folder: Path, **changed: Any) -> DistilSettings:
    """Settings for text in `folder`; `changed` of Training."""
    training: dict[str, Any] = {"steps": STEPS, "batch": 2, "window": 32, "learning_rate": 1e-2, "warm_up": 2}
    return DistilSettings(
        training=Training(**{**training, **changed}),
        split=SplitSettings(experts=4, top_k=2, calibration_tokens=512, held_out_tokens=512, window=64),
        ranks=RANKS,
        text=(folder / "seen.txt",),
        held_out=(folder / "held_out.txt",),
        curve_every=5,
        save_every_s=0.0,
        dtype=torch.float32,
    )
