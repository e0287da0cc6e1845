"""The picture sheet of a broadcast: for each user what was sent, what came, what differs, and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wdmoe.arrays import Pixels

AMPLIFIED = 4  # the difference, so that it is seen
_CELL = 384  # pixels of the longer side of a picture on the sheet
_GAP, _TEXT = 16, 14
_COLUMNS = ("sent", "received", f"difference, {AMPLIFIED} times")
_INK, _PALE, _PAPER = (32, 32, 32), (225, 225, 225), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One user."""

    title: str
    facts: str
    sent: Pixels
    received: Pixels | None  # None: lost


def draw_sheet(heading: str, rows: Sequence[SheetRow]) -> Image.Image:
    """All users below each other."""
    pictures = [[_fitted(each) for each in _cells(row)] for row in rows]
    heights = [max(cell.height for cell in cells) for cells in pictures]
    line = _TEXT + 6
    width = 3 * _CELL + 4 * _GAP
    sheet = Image.new("RGB", (width, 2 * _GAP + line + sum(h + 3 * line + _GAP for h in heights)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    draw.text((_GAP, _GAP), heading, _INK, font)
    top = 2 * _GAP + line
    for row, cells, height in zip(rows, pictures, heights, strict=True):
        draw.text((_GAP, top), row.title, _INK, font)
        draw.text((_GAP, top + line), row.facts, _INK, font)
        for column, (cell, name) in enumerate(zip(cells, _COLUMNS, strict=True)):
            left = _GAP + column * (_CELL + _GAP)
            draw.text((left, top + 2 * line), name, _INK, font)
            sheet.paste(cell, (left, top + 3 * line))
        top += height + 3 * line + _GAP
    return sheet


def _cells(row: SheetRow) -> list[Image.Image]:
    sent = Image.fromarray(row.sent)
    if row.received is None:
        blank = Image.new("RGB", sent.size, _PALE)
        return [sent, blank, blank]
    apart = np.abs(row.sent.astype(np.int16) - row.received)
    return [sent, Image.fromarray(row.received), Image.fromarray(np.minimum(apart * AMPLIFIED, 255).astype(np.uint8))]


def _fitted(picture: Image.Image) -> Image.Image:
    """As large as a cell: shrunk smoothly, or enlarged by whole pixels, so that these can be seen."""
    long = max(picture.size)
    if long > _CELL:
        factor = _CELL / long
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        return picture.resize(size, Image.Resampling.LANCZOS)
    times = _CELL // long
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
