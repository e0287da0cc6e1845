"""What came out: spreads and ratios, what they depend on, and the table."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.lab import line, show, spread

ROOT = Path(__file__).resolve().parents[3]
ONE = "one client"
MANY = "{} at once"
Entry = tuple[str, str]  # name and precision of what takes part


@dataclass
class Rounds:
    """Tokens per second: by part, by what takes part, one a round."""

    rates: dict[str, dict[Entry, list[float]]] = field(default_factory=dict)

    def add(self, part: str, entry: Entry, rate: float) -> None:
        self.rates.setdefault(part, {}).setdefault(entry, []).append(rate)

    def figures(self, order: list[Entry], baseline: str) -> dict[str, dict[str, Any]]:
        """Spreads of tokens per second and, where the baseline has figures, of the ratios in each round."""
        found = {}
        for part, by_entry in self.rates.items():
            found[part] = _against({entry: by_entry[entry] for entry in order if entry in by_entry}, baseline)
        return found


def _against(by_entry: dict[Entry, list[float]], baseline: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (name, precision), rates in by_entry.items():
        figure: dict[str, Any] = {"tokens_per_s": spread(rates), "rounds": [round(rate, 4) for rate in rates]}
        if (base := by_entry.get((baseline, precision))) is not None and name != baseline:
            figure["over_baseline"] = spread([rate / one for rate, one in zip(rates, base, strict=True)])
        found[f"{name} {precision}"] = figure
    return found


def report(found: dict[str, Any]) -> None:
    """Print the table."""
    settings, machine, known = found["settings"], found["machine"], found["versions"]
    load = ", ".join(f"{each:.2f}" for each in machine["load_at_start"])
    seen = [
        ("llama.cpp", known["llama.cpp"] or "took no part"),
        ("wdmoe", known["wdmoe_commit"]),
        ("onnxruntime", known["onnxruntime"]),
        ("seed", str(known["seed"])),
        ("machine", f"{machine['processor']}, {machine['cores']} cores, load {load} at the start"),
        ("threads", ", ".join(f"{name}: {count}" for name, count in found["threads"].items())),
    ]
    prompt = f"behind a prompt of {settings['prompt']}"
    show(f"Default model, {settings['rounds']} rounds, baseline {settings['baseline']}", seen)
    for part, by_name in found["figures"].items():
        title = f"{ONE}, {settings['tokens']} tokens {prompt}, which is not timed"
        if part != ONE:
            title = f"{part}, {settings['many_tokens']} tokens each {prompt}, which is timed"
        rows = []
        for name, figure in by_name.items():
            rows.append((name, line(figure["tokens_per_s"], "tokens/s")))
            if ratio := figure.get("over_baseline"):
                rows.append((f"  over {settings['baseline']}", line(ratio, "")))
        show(title, rows)
    for note in found["notes"]:
        print(f"\nNote: {note}")


def commit() -> str:
    """Of this checkout, "-dirty" behind it where something is not committed."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine(load: tuple[float, float, float]) -> dict[str, Any]:
    """What it is, and how busy it was."""
    name = platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux tells more
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(each.split(":", 1)[1].strip() for each in lines if each.startswith("model name"))
    return {"processor": name, "cores": os.cpu_count(), "load_at_start": [round(each, 2) for each in load]}
