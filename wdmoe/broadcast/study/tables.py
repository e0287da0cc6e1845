"""Results as text: CSV with every figure, and one page of Markdown for people. All follows from the qualities."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

from wdmoe.broadcast.baselines.classical_fading import TOLD_BLOCKS, TOLD_MEAN
from wdmoe.broadcast.quality.front_comparison import Lead, Standing, leads, standings
from wdmoe.broadcast.quality.metrics import Interval
from wdmoe.broadcast.quality.pareto_front import QUALITIES, Front
from wdmoe.broadcast.study.study import JOINT, SINGLE, Fronts

Results = Mapping[str, Fronts]  # by name of the setting

FRONTS, STANDINGS, LEADS, PAGE = "fronts.csv", "standings.csv", "leads.csv", "results.md"


def texts_of(results: Results, main: Sequence[str]) -> dict[str, str]:
    """By name of the file.

    Args:
        main: names of the settings that the page shows in full.
    """
    stood = {name: standings(fronts) for name, fronts in results.items()}
    led = {name: leads(fronts, JOINT) for name, fronts in results.items()}
    return {
        FRONTS: csv_text(front_rows(results)),
        STANDINGS: csv_text(_record_rows(Standing, stood)),
        LEADS: csv_text(_record_rows(Lead, led)),
        PAGE: _page(stood, led, main),
    }


def front_rows(results: Results) -> Iterator[list[str]]:
    """The header, then the mean qualities at every point of every front."""
    yield ["setting", "system", "share", *(f"{name}_{user}" for name in QUALITIES for user in (1, 2))]
    for setting, fronts in results.items():
        for system, front in fronts.items():
            yield from ([setting, system, *row] for row in _means(front))


def _means(front: Front) -> Iterator[list[str]]:
    columns = [getattr(front, name).astype(float).mean(axis=1) for name in QUALITIES]
    for point, share in enumerate(front.share):
        yield [f"{share:.6g}", *(f"{value:.5f}" for column in columns for value in column[point])]


def columns_of(field: Field[Any]) -> list[str]:
    """Of a figure: one, or with its interval three."""
    name = field.name
    return [name, f"{name}_low", f"{name}_high"] if "Interval" in str(field.type) else [name]


def _record_rows(
    kind: type[Standing] | type[Lead], found: Mapping[str, Mapping[str, Standing] | Mapping[str, Lead]]
) -> Iterator[list[str]]:
    header: list[str] = []
    for field in fields(kind):
        header += columns_of(field)
    yield ["setting", "system", *header]
    for setting, systems in found.items():
        for system, record in systems.items():
            cells = [cell for field in fields(kind) for cell in cells_of(getattr(record, field.name))]
            yield [setting, system, *cells]


def cells_of(value: Interval | float | bool) -> list[str]:
    """The cells of `columns_of`."""
    if isinstance(value, Interval):
        return [f"{each:.5f}" for each in (value.value, value.low, value.high)]
    return [str(value)] if isinstance(value, bool) else [f"{value:.5f}"]


def csv_text(rows: Iterable[Sequence[str]]) -> str:
    """Rows as CSV, the header first."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _page(
    stood: Mapping[str, Mapping[str, Standing]], led: Mapping[str, Mapping[str, Lead]], main: Sequence[str]
) -> str:
    parts = ["# Broadcast: who reaches what", _LEGEND]
    parts += [_full(name, stood[name], led[name]) for name in main]
    others = [name for name in stood if name not in main]
    if others:
        parts += ["## All other settings", _short({name: (stood[name], led[name]) for name in others})]
    return "\n\n".join(parts) + "\n"


_LEGEND = (
    "Hypervolume in dB^2 above 12 dB with its 95 % interval (bootstrap over pairs). Equal: the PSNR of both "
    "users where it is the same. Lead: of the joint codec at equal quality, dB; negative is behind. Ahead: over how "
    "much of the first user's qualities the joint codec gives the second one more; at worst: its smallest lead there, "
    "and the first user's PSNR at that point. Where channels fade, classical codecs "
    f"{TOLD_MEAN} know what the learned ones know, and the CSI error, and lose blocks; those {TOLD_BLOCKS} send at its "
    "capacity, which is more than any other system is told."
)


def _full(name: str, stood: Mapping[str, Standing], led: Mapping[str, Lead]) -> str:
    head = ["system", "hypervolume", "equal, dB", "lead, dB", "intervals apart", "ahead", "at worst"]
    rows = [
        [system, spread(each.area, 1), f"{each.equal_db.value:.2f}", *_lead_cells(led.get(system))]
        for system, each in stood.items()
    ]
    return f"## {name[0].upper()}{name[1:]}\n\n{markdown(head, rows)}"


def _lead_cells(lead: Lead | None) -> list[str]:
    if lead is None:
        return ["", "", "", ""]
    ahead = f"{100 * lead.ahead:.0f} %"
    worst = f"{lead.least_db:+.2f} dB at {lead.least_at_db:.1f} dB"
    return [spread(lead.equal_db, 2, "+"), "yes" if lead.apart else "no", ahead, worst]


def _short(found: Mapping[str, tuple[Mapping[str, Standing], Mapping[str, Lead]]]) -> str:
    """The joint codec, and the best of the learned and of the classical systems by hypervolume.

    Classical systems that are told each block's SNR, as no other is, have a line of their own in these cells.
    """
    head = ["setting", "joint: hypervolume", "best learned baseline", "lead, dB", "best classical", "lead, dB"]
    rows = []
    for name, (stood, led) in found.items():
        learned = [each for each in led if each.startswith(SINGLE)]
        told = [each for each in led if TOLD_BLOCKS in each]
        classical = [each for each in led if each not in (*learned, *told)]
        cells = _best_cells([learned], stood, led) + _best_cells([classical, told], stood, led)
        rows.append([name, spread(stood[JOINT].area, 1), *cells])
    return markdown(head, rows)


def _best_cells(groups: Sequence[Sequence[str]], stood: Mapping[str, Standing], led: Mapping[str, Lead]) -> list[str]:
    """Hypervolume of the best system of each group that is not empty, and the joint codec's lead over it."""
    best = [max(names, key=lambda each: stood[each].area.value) for names in groups if names]
    areas = (f"{each}: {spread(stood[each].area, 1)}" for each in best)
    return ["<br>".join(areas), "<br>".join(spread(led[each].equal_db, 2, "+") for each in best)]


def spread(value: Interval, digits: int, sign: str = "") -> str:
    """A figure and, in brackets, its interval."""
    return f"{value.value:{sign}.{digits}f} ({value.low:{sign}.{digits}f} to {value.high:{sign}.{digits}f})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without a newline at its end."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
