"""What a broadcast came to: pictures, the sheet, and the figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wdmoe.broadcast.codec.contact_sheet import SheetRow, draw_sheet
from wdmoe.broadcast.codec.png import png_bytes
from wdmoe.broadcast.quality.large_pictures import picture_psnr_db, picture_ssim
from wdmoe.errors import ConfigError
from wdmoe.nodes.broadcast_station.listeners import Audience, Listener
from wdmoe.nodes.broadcast_station.run import Sending

FORMAT = 1
SHEET, RESULT = "sheet.png", "result.json"


@dataclass(frozen=True, slots=True)
class UserResult:
    """One user. Without a picture there are no figures."""

    user: int  # 1 or 2
    picture: str
    width: int
    height: int
    snr_db: float
    state: str  # "shown" or "lost"
    reason: str
    received: str | None  # file in the folder
    psnr_db: float | None
    ssim: float | None  # also None where a side is below 11 pixels
    blocks: int  # that it needs
    lost_blocks: int | None
    symbols_per_value: float  # complex uses of the whole broadcast over the values of this picture
    decode_s: float | None

    def line(self) -> str:
        """For people."""
        name = f"user {self.user}: {Path(self.picture).name}, {self.width}x{self.height} at {self.snr_db:g} dB"
        if self.psnr_db is None:
            return f"{name}: lost; {self.reason}"
        ssim = "" if self.ssim is None else f", SSIM {self.ssim:.3f}"
        lost = f", {self.lost_blocks} of {self.blocks} blocks lost" if self.lost_blocks else ""
        return f"{name}: PSNR {self.psnr_db:.2f} dB{ssim}{lost}"


def prepare_folder(folder: Path) -> None:
    """Make the folder, and take away what an earlier run left there, so that nothing old passes for new.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (_received(0), _received(1), SHEET, RESULT):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from error


def write_results(sending: Sending, audience: Audience, bytes_on_air: int) -> tuple[dict[str, Any], list[UserResult]]:
    """Write received pictures, sheet and `result.json`. Blocking.

    Returns:
        What stands in `result.json`, and each user's part of it.
    Raises:
        ConfigError: the folder cannot be written to.
    """
    source, settings = sending.job.source, sending.settings
    symbols = source.plan.blocks * source.uses
    users = [_user(sending, listener, symbols) for listener in audience]
    document = {
        "format": FORMAT,
        "kind": "semantic broadcast",
        "model_sha256": sending.model_sha256,
        "decoder_sha256": sending.job.decoder_sha256,
        "alpha": source.alpha,
        "cbr": source.cbr,
        "fading": settings.fading,
        "seed": settings.seed,
        "blocks": source.plan.blocks,
        "shared_blocks": source.plan.shared,
        "complex_symbols": symbols,
        "bytes_on_air": bytes_on_air,
        "users": [_plain(user) for user in users],
    }
    rows = [_row(sending, listener, user) for listener, user in zip(audience, users, strict=True)]
    heading = (
        f"{symbols} complex symbols once for both, {source.plan.blocks} blocks; "
        f"alpha {source.alpha:g}, CBR {source.cbr:.4g} of a block, {settings.fading}"
    )
    try:
        for listener in audience:
            if listener.picture is not None:
                (settings.out / _received(listener.user)).write_bytes(png_bytes(listener.picture))
        draw_sheet(heading, rows).save(settings.out / SHEET)
        (settings.out / RESULT).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {settings.out}: {error.strerror or error}") from error
    return document, users


def _user(sending: Sending, listener: Listener, symbols: int) -> UserResult:
    sent, got, shown = sending.pair[listener.user], listener.picture, listener.shown
    return UserResult(
        user=listener.user + 1,
        picture=str(sending.settings.pictures[listener.user]),
        width=listener.grid.width,
        height=listener.grid.height,
        snr_db=sending.settings.snr_db[listener.user],
        state=listener.state,
        reason=listener.reason,
        received=None if got is None else _received(listener.user),
        psnr_db=None if got is None else picture_psnr_db(sent, got),
        ssim=None if got is None else picture_ssim(sent, got),
        blocks=listener.grid.tiles,
        lost_blocks=None if shown is None else shown.lost,
        symbols_per_value=symbols / sent.size,
        decode_s=None if shown is None else shown.decode_s,
    )


def _row(sending: Sending, listener: Listener, user: UserResult) -> SheetRow:
    title, facts = user.line().split(": ", 1)
    return SheetRow(title, facts, sending.pair[listener.user], listener.picture)


def _plain(user: UserResult) -> dict[str, Any]:
    return {name: getattr(user, name) for name in user.__dataclass_fields__}


def _received(user: int) -> str:
    return f"received-{user + 1}.png"
