"""A gate trace of a whole checkpoint reading text on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wdmoe.backbone import text_windows as texts
from wdmoe.backbone.evaluation.trace_recorder import TraceRecorder
from wdmoe.errors import BundleError, ConfigError
from wdmoe.results.gate_trace import GateTrace


@torch.no_grad()
def record_trace(
    folder: Path,
    text: tuple[Path, ...],
    tokens: int,
    window: int,
    similarity: bool,
    progress: Callable[[str, float], None],
    *,
    expert_similarity: bool = False,
) -> GateTrace:
    """Let a model read text and record its gates.

    Args:
        folder: of a transformers MoE checkpoint.
        text: files to read; () for the shipped held-out text.
        tokens: to record; cut to whole windows.
        window: tokens of one sequence.
        similarity: also record how alike neighbouring hidden states are.
        progress: told (stage, fraction done).
        expert_similarity: also measure how well experts stand in for each other.
    Raises:
        BundleError: the model cannot be loaded or has no experts.
        ConfigError: the text cannot be read or is too short, or `tokens` is less than a window.
    """
    if tokens < window:
        raise ConfigError(f"tokens ({tokens}) must be at least one window ({window})")
    progress("load", 0.0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder} is no checkpoint that transformers loads: {str(error).splitlines()[0]}") from error
    documents = texts.read_documents(text, texts.SHIPPED_HELD_OUT)
    windows = torch.from_numpy(texts.token_windows(documents, tokenizer, window, tokens // window))
    with TraceRecorder(loaded, folder.name, similarity=similarity, expert_similarity=expert_similarity) as recorder:
        for done, ids in enumerate(windows):
            progress("read", done / len(windows))
            loaded(input_ids=ids[None], use_cache=False)
    progress("read", 1.0)
    return recorder.trace()
