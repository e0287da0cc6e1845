"""What llama-bench and llama-batched-bench are told, and what they answer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.rivals.programs import PeerError, last_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A model, and where it is computed."""

    gguf: Path
    blocks: int  # of the model
    threads: int
    hosts: tuple[str, ...] = ()  # HOST:PORT of the servers that hold the experts; none: all in one process


@dataclass(frozen=True, slots=True)
class Rate:
    """What llama-bench measured."""

    tokens_per_s: float
    build: str
    model: str


def overrides(blocks: int, hosts: Sequence[str]) -> list[str]:
    """Which server holds which experts: PATTERN=BUFFER for each, the blocks divided in order, as evenly as they go.

    Raises:
        PeerError: there are more servers than blocks.
    """
    if not 0 < len(hosts) <= blocks:
        raise PeerError(f"the model has {blocks} blocks: give from 1 to {blocks} servers, not {len(hosts)}")
    ends = [round(blocks * n / len(hosts)) for n in range(len(hosts) + 1)]
    found = []
    for host, first, end in zip(hosts, ends, ends[1:], strict=False):
        block = "|".join(map(str, range(first, end)))
        # Neither a comma, a semicolon nor an equals sign: the programs split there. "_exps" is no shared expert's name.
        found.append(rf"blk\.({block})\.ffn_.*_exps=RPC0[{host}]")
    return found


def bench_words(program: Path, work: Work, prompt: int, tokens: int) -> list[str]:
    """One client: so many tokens, one after another, behind a prompt that is not timed."""
    words = [program, "-m", work.gguf, "-p", 0, "-n", tokens, "-d", prompt, "-t", work.threads]
    return [*map(str, words), "-r", "1", "-o", "json", *_where(work, ";")]


def batched_words(program: Path, work: Work, prompt: int, tokens: int, clients: Sequence[int]) -> list[str]:
    """Many clients: each has a prompt of its own, and all get their tokens in the same passes."""
    context = max(clients) * (prompt + tokens)
    words = [program, "-m", work.gguf, "-c", context, "-npp", prompt, "-ntg", tokens, "-t", work.threads]
    words += ["-npl", ",".join(map(str, clients)), "--output-format", "jsonl"]
    return [*map(str, words), *_where(work, ",")]


def _where(work: Work, separator: str) -> list[str]:
    """No layer on a graphics card; the experts on the servers. The two programs separate overrides differently."""
    if not work.hosts:
        return ["-ngl", "0"]
    spread = separator.join(overrides(work.blocks, work.hosts))
    return ["--rpc", ",".join(work.hosts), "-ngl", "0", "-ot", spread]


def read_bench(out: str) -> Rate:
    """What `llama-bench -o json` printed: one test.

    Raises:
        PeerError: it is something else.
    """
    start = out.find("[\n")  # whatever libraries printed before
    try:
        (test,) = json.loads(out[start:] if start >= 0 else out)
        rate = _positive(test["avg_ts"])
        return Rate(rate, f"{test['build_number']} ({test['build_commit']})", str(test["model_type"]))
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(f"llama-bench did not print the JSON of one test: {last_line(out) or 'nothing'}") from error


def read_batched(out: str, clients: Sequence[int]) -> dict[int, float]:
    """What `llama-batched-bench --output-format jsonl` printed: tokens per second of so many clients together.

    Counted are the tokens that were made, over the time of all, prompts included.

    Raises:
        PeerError: it is something else, or lacks a number of clients.
    """
    found = {}
    for line in out.splitlines():
        if line.startswith("{"):
            try:
                test: dict[str, Any] = json.loads(line)
                found[int(test["pl"])] = _positive(test["pl"] * test["tg"] / (test["t_pp"] + test["t_tg"]))
            except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
                raise PeerError(f"llama-batched-bench printed a line of another form: {last_line(line)}") from error
    missing = [str(each) for each in clients if each not in found]
    if missing:
        raise PeerError(f"llama-batched-bench printed nothing for {', '.join(missing)} clients: {last_line(out)}")
    return {each: found[each] for each in clients}


def _positive(value: Any) -> float:
    if not 0 < float(value) < math.inf:
        raise ValueError(value)
    return float(value)
