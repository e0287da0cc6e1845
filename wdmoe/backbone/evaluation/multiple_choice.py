"""Multiple-choice questions: read from JSONL or BIG-bench, and answered by likelihood."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from wdmoe.errors import ConfigError, MissingExtraError

DELIMITER = "\nAnswer: "
_MOST_TOKENS = 2048  # of a question with one choice; a longer question loses its beginning
_MOST_BYTES = 1 << 30
_INSTALL = "pip install --no-deps bigbench==1.0.0"


@dataclass(frozen=True, slots=True)
class Question:
    """A text, and the ways it may go on."""

    query: str  # with all that stands before an answer
    choices: tuple[str, ...]
    best: frozenset[int]  # which of them are right


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What a model makes of a question."""

    right: bool  # the choice of the greatest likelihood is a right one
    right_normalised: bool  # the choice of the greatest likelihood for each byte of its text is


def read_questions(file: Path, delimiter: str = DELIMITER) -> list[Question]:
    """Questions of a JSONL file: one `{"query": text, "choices": [texts], "gold": index or [scores]}` a line.

    Args:
        delimiter: between query and choice.
    Raises:
        ConfigError: the file cannot be read, or a line is of another form; the message has its number.
    """
    questions = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            query, choices, gold = record["query"], record["choices"], record["gold"]
            questions.append(_question(query + delimiter, choices, gold))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            said = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f'{file} line {number} is not {{"query": text, "choices": [texts], "gold": index or scores}}: {said}'
            ) from error
    if not questions:
        raise ConfigError(f"{file} holds no question")
    return questions


def read_bigbench(task: str) -> list[Question]:
    """A multiple-choice JSON task of BIG-bench: a `task.json`, or the name of one in the package `bigbench`.

    Raises:
        ConfigError: there is no such task, or it is not multiple choice.
        MissingExtraError: a name is given and the package is not installed.
    """
    file = Path(task)
    if not file.is_file():
        file = _installed(task)
    try:
        record = json.loads(_text(file))
        examples = record["examples"]
        before = str(record.get("task_prefix", "")) + str(record.get("example_input_prefix", "\nQ: "))
        after = str(record.get("example_output_prefix", "\nA: "))
        listed = (
            str(record.get("choice_prefix", "\n  choice: ")) if record.get("append_choices_to_input", True) else None
        )
        questions = [_example(each, before, after, listed) for each in examples]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is no multiple-choice task: it needs examples with input and target_scores"
        ) from error
    if not questions:
        raise ConfigError(f"{file} holds no question")
    return questions


@torch.no_grad()
def choice_nats(model: Any, tokenizer: Any, question: Question, heard: Any = None) -> list[float]:
    """Negative log-likelihood of each choice after the query.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        heard: told (choices, length) bool of the tokens that are real before the model runs; others only fill up.
    """
    rows = [_ids(tokenizer, question.query, choice) for choice in question.choices]
    length = max(len(ids) for ids, _ in rows)
    batch = torch.zeros(len(rows), length, dtype=torch.long)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (ids, _) in enumerate(rows):
        batch[row, : len(ids)] = torch.tensor(ids)
        real[row, : len(ids)] = True
    if heard is not None:
        heard(real)
    # Filled at the right: with causal attention no real token sees it, so no mask is needed.
    logits = model(input_ids=batch.to(model.device), use_cache=False).logits.float().cpu()
    nats = functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none")
    return [float(nats[row, start - 1 : len(ids) - 1].sum()) for row, (ids, start) in enumerate(rows)]


def score(question: Question, nats: Sequence[float]) -> Scored:
    """Whether the likeliest choice is right, by the whole likelihood and by that of each byte."""
    by_byte = [each / max(len(text.encode()), 1) for each, text in zip(nats, question.choices, strict=True)]
    return Scored(_least(nats) in question.best, _least(by_byte) in question.best)


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _ids(tokenizer: Any, query: str, choice: str) -> tuple[list[int], int]:
    """Token ids of both, and where the choice begins. Blanks between the two are the choice's: so tokens are cut."""
    stem = query.rstrip(" ")
    whole = list(tokenizer(query + choice, add_special_tokens=False, verbose=False)["input_ids"])
    known = list(tokenizer(stem, add_special_tokens=False, verbose=False)["input_ids"])
    common = next((i for i, (a, b) in enumerate(zip(whole, known, strict=False)) if a != b), len(known))
    start = max(1, min(common, len(whole) - 1))
    cut = max(0, min(len(whole) - _MOST_TOKENS, start - 1))
    return whole[cut:], start - cut


def _question(query: Any, choices: Any, gold: Any) -> Question:
    if not isinstance(query, str) or not query.strip():
        raise ValueError("query must be a text that is not empty")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) and each for each in choices):
        raise ValueError("choices must be two or more texts that are not empty")
    if isinstance(gold, list):
        scores = [float(each) for each in gold]
        if len(scores) != len(choices) or any(each != each for each in scores):
            raise ValueError(f"gold must have {len(choices)} scores, got {gold!r:.80}")
        best = frozenset(i for i, each in enumerate(scores) if each == max(scores))
        return Question(query, tuple(choices), best)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"gold must be an index from 0 to {len(choices) - 1} or a list of scores, got {gold!r:.80}")
    return Question(query, tuple(choices), frozenset({gold}))


def _example(example: Any, before: str, after: str, listed: str | None) -> Question:
    """`listed`: what stands before each choice in the question itself; None: they do not stand there."""
    scores: dict[str, float] = example["target_scores"]
    choices = list(scores)
    lines = "".join(f"{listed}{choice}" for choice in choices) if listed is not None else ""
    query = f"{before}{example['input']}{lines}{after}"
    return _question(query.lstrip(), choices, list(scores.values()))


def _installed(task: str) -> Path:
    """The file of a task in the package, which is not imported."""
    spec = util.find_spec("bigbench")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"BIG-bench task {task!r} is no file, and the package is not installed: {_INSTALL}")
    tasks = Path(next(iter(spec.submodule_search_locations))) / "benchmark_tasks"
    if not all(part.replace("_", "").replace("-", "").isalnum() for part in task.split("/")):
        raise ConfigError(f"BIG-bench task {task!r} is not a name")
    file = tasks / task / "task.json"
    if file.is_file():
        return file
    parts = sorted(str(each.parent.relative_to(tasks)) for each in (tasks / task).glob("*/task.json"))
    raise ConfigError(f"BIG-bench has no task {task!r} in {tasks}" + (f"; it has {', '.join(parts)}" if parts else ""))


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{file} is larger than 1 GiB")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
