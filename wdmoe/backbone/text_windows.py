"""Calibration and held-out text: documents from files, cut into windows of tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from wdmoe.arrays import Int64Array
from wdmoe.backbone.text.tokenizer import TextTokenizer
from wdmoe.errors import ConfigError

SHIPPED_CALIBRATION = "calibration.jsonl.gz"
SHIPPED_HELD_OUT = "held_out.jsonl.gz"

_PLAIN_PIECE = 4000  # characters of a plain file tokenised at a time


def read_documents(files: Sequence[Path], shipped: str) -> Iterator[Any]:
    """Documents of the given files, or of the shipped one: text, or a list of chat messages.

    `.jsonl` and `.jsonl.gz` hold one `{"text": ...}` or `{"messages": [...]}` a line; anything else is plain UTF-8.

    Raises:
        ConfigError: a file cannot be read or is of another form.
    """
    if not files:
        raw = resources.files("wdmoe.backbone").joinpath("data", shipped).read_bytes()
        yield from _parse(gzip.decompress(raw).decode(), shipped)
        return
    for file in files:
        try:
            raw = file.read_bytes()
            text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ConfigError(f"text file {file} cannot be read: {error}") from error
        yield from _parse(text, file.name) if ".jsonl" in file.suffixes else [text]


def token_windows(documents: Iterator[Any], tokenizer: TextTokenizer, length: int, count: int) -> Int64Array:
    """Cut documents into windows of equal length; long documents give several, short ones are joined.

    Args:
        length: tokens of a window.
        count: windows wanted; fewer come back if the text ends before.
    Returns:
        (windows, length).
    Raises:
        ConfigError: the text does not fill one window.
    """
    windows: list[list[int]] = []
    rest: list[int] = []
    for document in documents:
        for piece in _pieces(document):
            rest += _tokens(piece, tokenizer)
            while len(rest) >= length and len(windows) < count:
                windows.append(rest[:length])
                rest = rest[length:]
            if len(windows) == count:
                return np.array(windows, np.int64)
    if not windows:
        raise ConfigError(f"the text is too short: {len(rest)} tokens, at least {length} are needed")
    return np.array(windows, np.int64)


def _parse(text: str, name: str) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            yield record["messages"] if "messages" in record else record["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{name} line {number} is not {{"text": ...}} or {{"messages": [...]}}') from error


def _pieces(document: Any) -> Iterator[Any]:
    if isinstance(document, str):
        for start in range(0, len(document), _PLAIN_PIECE):
            yield document[start : start + _PLAIN_PIECE]
    else:
        yield document


def _tokens(piece: Any, tokenizer: TextTokenizer) -> list[int]:
    if not isinstance(piece, str) and tokenizer.chat_template is not None:
        piece = tokenizer.apply_chat_template(piece, tokenize=False)
    elif not isinstance(piece, str):
        piece = "\n".join(f"{message['role']}: {message['content']}" for message in piece)
    return list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
