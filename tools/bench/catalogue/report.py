"""The table: one row for each fault, from the tries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tools.bench.catalogue.records import TryRecord
from tools.bench.catalogue.registry import all_faults

HEAD = ("fault", "tries", "passed", "answers", "completed", "exact", "degraded, said", "error, said", "longest pause",
        "back after", "wrong, called right", "leftovers")  # fmt: skip


def rows(tries: list[TryRecord], *, by_cell: bool = False) -> list[tuple[str, ...]]:
    """Cells as text; `by_cell`: a row for each number of copies and phase."""
    groups: dict[tuple[str, str], list[TryRecord]] = {}
    for each in tries:
        cell = f"{each.copies or '-'} copies, {each.phase or '-'}" if by_cell else ""
        groups.setdefault((each.fault, cell), []).append(each)
    order = list(all_faults())
    keys = sorted(groups, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key[1]))
    return [_row(fault, cell, groups[fault, cell]) for fault, cell in keys]


def markdown(tries: list[TryRecord], *, by_cell: bool = False) -> str:
    """For a page."""
    lines = [HEAD, tuple("---" for _ in HEAD), *rows(tries, by_cell=by_cell)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plain(tries: list[TryRecord], *, by_cell: bool = False) -> str:
    """For a terminal: columns."""
    lines = [HEAD, *rows(tries, by_cell=by_cell)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def complaints(tries: list[TryRecord], most: int = 6) -> str:
    """What failed, by fault: each different complaint once, with how often and the seed of the first."""
    lines = []
    for fault in dict.fromkeys(each.fault for each in tries):
        counts: Counter[str] = Counter()
        seeds: dict[str, str] = {}
        for each in (each for each in tries if each.fault == fault):
            for text in (*each.violations, *each.leftovers, *((f"not tried: {each.skipped}",) if each.skipped else ())):
                kind = _kind(text)
                counts[kind] += 1
                seeds.setdefault(kind, f"{text}   [{each.seed}, {each.copies} copies, {each.phase or '-'}]")
        lines += [f"{fault}: {count} x {seeds[kind]}" for kind, count in counts.most_common(most)]
    return "\n".join(lines)


def _kind(text: str) -> str:
    """The complaint without its figures."""
    return "".join(c for c in text if not c.isdigit())[:60]


def _row(fault: str, cell: str, tries: list[TryRecord]) -> tuple[str, ...]:
    title = all_faults()[fault].title if fault in all_faults() else ""
    made = [each for each in tries if not each.skipped]
    pause_s = max((each.longest_pause_s for each in made), default=0.0)
    back_s = max((each.settled_s for each in made), default=0.0)
    left = sum(bool(each.leftovers) for each in made)
    return (
        f"{fault} {cell or title}",
        str(len(made)) if made else "not tried",
        f"{_sum(made, 'passed')}",
        *(str(_sum(made, name)) for name in ("answers", "completed", "exact", "admitted", "refused")),
        f"{pause_s:.2f} s" if pause_s else "-",
        f"{back_s:.1f} s" if back_s else "-",
        str(_sum(made, "wrong")),
        str(left) if left else "none",
    )


def _sum(tries: Iterable[TryRecord], name: str) -> int:
    return sum(int(getattr(each, name)) for each in tries)
