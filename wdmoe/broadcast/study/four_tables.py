"""Results of four users as text: every set of pictures as CSV, and a page for people that follows from it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

import numpy as np

from wdmoe.broadcast.study.four_users import ALONE, LAYERS, SNR_DB, TURNS, FourUsers
from wdmoe.errors import ConfigError

SETS, PAGE = "four-users.csv", "four-users.md"
_USERS = [f"{snr:g} dB" for pair in SNR_DB for snr in pair]
_CHOSEN = {
    TURNS: "slots of the first block {:g}, alphas {:.1f} and {:.1f}",
    LAYERS: "power of the first block {:.2f}, alphas {:.1f} and {:.1f}",
    ALONE: "slots {:.2f}, {:.2f}, {:.2f} and {:.2f}",
}
_RESAMPLES, _SEED = 2000, 20240610


def sets_text(found: Mapping[str, FourUsers]) -> str:
    """CSV: the numbers that were chosen, and every set's PSNR with all digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["system", "chosen", "set", *_USERS])
    for system, each in found.items():
        chosen = " ".join(repr(float(number)) for number in each.chosen)
        for place, row in enumerate(each.psnr_db):
            writer.writerow([system, chosen, place, *(repr(float(value)) for value in row)])
    return out.getvalue()


def read_sets(text: str) -> dict[str, FourUsers]:
    """The inverse of `sets_text`; ConfigError if it is not such a text."""
    rows: dict[str, list[list[float]]] = {}
    chosen: dict[str, tuple[float, ...]] = {}
    try:
        for system, numbers, _place, *values in list(csv.reader(io.StringIO(text)))[1:]:
            chosen[system] = tuple(float(number) for number in numbers.split())
            rows.setdefault(system, []).append([float(value) for value in values])
        return {
            system: FourUsers(chosen[system], np.array(values).reshape(-1, len(_USERS)))
            for system, values in rows.items()
        }
    except ValueError as error:
        raise ConfigError(f"{SETS} does not hold sets of four users: {error}") from error


def page_text(found: Mapping[str, FourUsers]) -> str:
    """Means and the worst user with its 95 % interval."""
    lines = [
        "# Four users on one block",
        "",
        "CBR 1/6, pictures of different classes; mean PSNR of each user, dB. Numbers were chosen on other pictures.",
        "",
        f"| system | {' | '.join(_USERS)} | worst user | chosen |",
        "| --- " * (len(_USERS) + 3) + "|",
    ]
    for system, each in found.items():
        means = each.psnr_db.mean(axis=0)
        count = len(each.psnr_db)
        drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES) / count
        low, high = np.quantile((drawn @ each.psnr_db).min(axis=1), [0.025, 0.975])
        chosen = _CHOSEN.get(system, "the same number of bits for each").format(*each.chosen)
        cells = " | ".join(f"{mean:.2f}" for mean in means)
        lines.append(f"| {system} | {cells} | {means.min():.2f} ({low:.2f} to {high:.2f}) | {chosen} |")
    return "\n".join(lines) + "\n"
