"""The two users of a broadcast as the base station sees them: who they are, how far, what came back. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from wdmoe.arrays import Pixels
from wdmoe.broadcast.codec.tiling import Grid
from wdmoe.errors import ProtocolError
from wdmoe.transport.codec.messages import Rows, Shown
from wdmoe.transport.membership import Device

State = Literal["awaited", "tuning", "listening", "shown", "lost"]


@dataclass(slots=True)
class Listener:
    """One user. Its methods are called with what its device says."""

    user: int
    grid: Grid
    name: str = ""  # of the device that must take this place; "": whoever comes
    key: str = ""  # of the device that did
    state: State = "awaited"
    reason: str = ""  # why it is lost
    moved_s: float = 0.0  # clock of its last progress
    rows: int = 0  # of its picture that came back
    shown: Shown | None = None
    _picture: Pixels = field(default_factory=lambda: np.empty((0, 0, 3), np.uint8))

    @property
    def open(self) -> bool:
        """There is still something to wait for."""
        return self.state not in ("shown", "lost")

    @property
    def picture(self) -> Pixels | None:
        """What was shown (height, width, 3), once all of it is here."""
        return self._picture if self.state == "shown" else None

    def seat(self, device: Device, now: float) -> None:
        """A device takes the place."""
        self.key, self.state, self.moved_s = device.key, "tuning", now

    def tuned(self, now: float) -> None:
        """It hears, and has a decoder."""
        if self.state == "tuning":
            self.state, self.moved_s = "listening", now

    def take_rows(self, message: Rows, now: float) -> None:
        """Rows of its picture.

        Raises:
            ProtocolError: not the next ones, or not of this picture.
        """
        rows, width, _ = message.pixels.shape
        fits = rows and width == self.grid.width and self.rows + rows <= self.grid.height
        if self.state != "listening" or not fits or message.first != self.rows:
            raise ProtocolError(
                f"rows {message.first} to {message.first + rows} of {width} pixels, where row {self.rows} of "
                f"{self.grid.width}x{self.grid.height} is due"
            )
        if not self._picture.size:
            self._picture = np.zeros((self.grid.height, self.grid.width, 3), np.uint8)
        self._picture[self.rows : self.rows + rows] = message.pixels
        self.rows, self.moved_s = self.rows + rows, now

    def take_shown(self, message: Shown) -> None:
        """All is here.

        Raises:
            ProtocolError: it is not.
        """
        if self.state != "listening" or self.rows != self.grid.height:
            raise ProtocolError(f"the end of a picture after {self.rows} of {self.grid.height} rows")
        if message.heard + message.lost != self.grid.tiles:
            raise ProtocolError(f"{message.heard} blocks heard and {message.lost} lost of {self.grid.tiles}")
        self.shown, self.state = message, "shown"

    def lose(self, reason: str) -> None:
        """It will not come back."""
        if self.open:
            self.state, self.reason = "lost", reason


class Audience:
    """Both users."""

    def __init__(self, grids: tuple[Grid, Grid], names: tuple[str, str] = ("", "")) -> None:
        self.listeners = tuple(
            Listener(user, grid, name) for user, (grid, name) in enumerate(zip(grids, names, strict=True))
        )

    def __iter__(self) -> Iterator[Listener]:
        return iter(self.listeners)

    def of_key(self, key: str) -> Listener | None:
        """Who a device is."""
        return next((each for each in self if each.key == key), None)

    def seat(self, devices: Sequence[Device], now: float) -> int:
        """Give the awaited places to devices, in their order, once there is one for each: until then one may leave.

        Returns:
            How many are missing; 0: all are seated.
        """
        free = [place for place in self if place.state == "awaited"]
        found: dict[int, Device] = {}
        for device in devices:
            for place in free:
                if place.user not in found and place.name in ("", device.report.name):
                    found[place.user] = device
                    break
        if len(found) == len(free):
            for place in free:
                place.seat(found[place.user], now)
        return len(free) - len(found)

    def waits_for(self, *states: State) -> bool:
        """Somebody is in one of these states."""
        return any(each.state in states for each in self)

    @property
    def open(self) -> bool:
        """Somebody may still show a picture."""
        return any(each.open for each in self)

    def lose_stuck(self, state: State, now: float, patience_s: float) -> None:
        """Give up on whoever is in this state and has made no progress for so long."""
        for each in self:
            if each.state == state and now - each.moved_s > patience_s:
                each.lose(f"its device made no progress for {patience_s:.0f} s while {state}")
