"""The comparison of losses as text: CSV with every figure, and a page for people. All follows from the qualities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from wdmoe.broadcast.quality.front_comparison import FLOOR_DB, Lead, Standing, leads, standings
from wdmoe.broadcast.quality.metrics import Interval
from wdmoe.broadcast.study.loss_plan import START
from wdmoe.broadcast.study.study import Fronts
from wdmoe.broadcast.study.tables import FRONTS, cells_of, columns_of, csv_text, front_rows, markdown, spread
from wdmoe.broadcast.training.training import Row

Results = Mapping[str, Fronts]  # by name of the setting
Figures = Mapping[str, tuple[Standing, Lead | None]]  # by system, with its lead over `sum`

REFERENCE = "sum"
LOSSES_CSV, CURVES, PAGE = "losses.csv", "curves.csv", "losses.md"


def loss_texts(results: Results, manifest: Mapping[str, Any]) -> dict[str, str]:
    """By name of the file.

    Args:
        results: fronts of all systems.
        manifest: `plan`, `versions` and `machine` of it stand on the page.
    """
    found = {setting: figures_of(fronts) for setting, fronts in results.items()}
    return {
        FRONTS: csv_text(front_rows(results)),
        LOSSES_CSV: csv_text(_rows(found)),
        PAGE: _page(found, manifest),
    }


def figures_of(fronts: Fronts) -> Figures:
    """Of every system of a setting."""
    return {
        name: (standing, None if name == REFERENCE else leads(fronts, name)[REFERENCE])
        for name, standing in standings(fronts).items()
    }


def curves_text(curves: Mapping[str, Sequence[Row]]) -> str:
    """The learning curves of all losses in one CSV; a cell is empty where a row has no such column."""
    columns = list(dict.fromkeys(name for rows in curves.values() for row in rows for name in row))
    lines = [
        [system, *(repr(row[name]) if name in row else "" for name in columns)]
        for system, rows in curves.items()
        for row in rows
    ]
    return csv_text([["system", *columns], *lines])


def _rows(found: Mapping[str, Figures]) -> Iterator[list[str]]:
    stood, led = ([name for each in fields(kind) for name in columns_of(each)] for kind in (Standing, Lead))
    yield ["setting", "system", *stood, *(f"lead_{name}" for name in led)]
    for setting, systems in found.items():
        for system, (standing, lead) in systems.items():
            more = _record(lead) if lead is not None else [""] * len(led)
            yield [setting, system, *_record(standing), *more]


def _record(record: Standing | Lead) -> list[str]:
    return [cell for each in fields(record) for cell in cells_of(getattr(record, each.name))]


def _page(found: Mapping[str, Figures], manifest: Mapping[str, Any]) -> str:
    parts = ["# Broadcast: which training loss gives the widest region", _how(manifest), _LEGEND]
    label = f"{START}: {'the model' if manifest['plan']['begin'] else 'untrained'}"
    parts += [f"## {name[0].upper()}{name[1:]}\n\n{_table(figures, label)}" for name, figures in found.items()]
    return "\n\n".join(parts) + "\n"


def _how(manifest: Mapping[str, Any]) -> str:
    plan, versions = manifest["plan"], manifest["versions"]
    steps, draws = plan["training"]["steps"], plan["batches"]
    began = (
        f"the model of SHA-256 {plan['begin']}" if plan["begin"] else "the untrained codec, which is the linear code"
    )
    told = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        f"```\n{plan['command']}\n```\n\n"
        f"Every loss trained once, {steps} steps of {draws['batch']} pairs, seed {draws['seed']}: the same batches and "
        f"noise, beginning with {began}. Measured on {plan['pictures']} of the pictures to choose by, none of those to "
        f"report on. {told}; {manifest['machine']}."
    )


_LEGEND = (
    f"Hypervolume in dB^2 above {FLOOR_DB:g} dB. Equal: the PSNR of both users where it is the same. Ahead: over how "
    f"much of the first user's qualities the second one gets more than with `{REFERENCE}`. Differences are to "
    f"`{REFERENCE}`, on the same pairs in the same noise. In brackets 95 % intervals, by a bootstrap over pairs of "
    "pictures; what another seed of the training would change is not in them. A star: the interval does not hold 0."
)


def _table(figures: Figures, start: str) -> str:
    head = ["loss", "hypervolume", "difference", "equal, dB", "difference, dB", "ahead"]
    rows = []
    for system, (stood, lead) in figures.items():
        cells = [start if system == START else system, spread(stood.area, 1), "", spread(stood.equal_db, 2), "", ""]
        if lead is not None:
            cells[2], cells[4] = _difference(lead.area, 1), _difference(lead.equal_db, 2)
            cells[5] = f"{100 * lead.ahead:.0f} %"
        rows.append(cells)
    return markdown(head, rows)


def _difference(value: Interval, digits: int) -> str:
    """With a star where the interval leaves no doubt about the sign."""
    return spread(value, digits, "+") + (" *" if value.low > 0 or value.high < 0 else "")
