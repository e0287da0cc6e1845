"""A whole broadcast: pictures in, two devices, pictures and figures out."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from wdmoe.arrays import Pixels
from wdmoe.broadcast.codec.decoder_export import decoder_graph
from wdmoe.broadcast.codec.image_file import read_picture
from wdmoe.broadcast.codec.model_file import load_model
from wdmoe.broadcast.quality.operating_point import choose_alpha
from wdmoe.broadcast.quality.quality_law import LAW_FILE, load_law
from wdmoe.errors import ConfigError
from wdmoe.nodes.broadcast_station.listeners import Audience
from wdmoe.nodes.broadcast_station.settings import LOCAL_BIND, BroadcastSettings
from wdmoe.nodes.broadcast_station.station import BroadcastStation, Job, Progress, Site
from wdmoe.nodes.broadcast_station.symbol_source import SymbolSource
from wdmoe.nodes.local.process import Child, ChildError, end_all
from wdmoe.tasks import in_thread

NAMES = ("user-1", "user-2")  # of the local device processes
_LOCAL_LEASE_S = 15.0  # both share this machine with the encoder; one that ended is seen at once
_FAREWELL_S = 5.0
_LOOK_S = 0.1

Tell = Callable[[str], None]
TellToken = Callable[[str, Path], None]


@dataclass(frozen=True, slots=True)
class Sending:
    """What is sent, ready."""

    settings: BroadcastSettings
    job: Job
    model_sha256: str

    @property
    def pair(self) -> tuple[Pixels, Pixels]:
        """Both pictures."""
        return self.job.source.pair


def prepare(settings: BroadcastSettings, note: Tell) -> Sending:
    """Read pictures and model, make the decoder. Blocking, some seconds.

    Args:
        note: told what of a picture was changed.
    Raises:
        ConfigError: a picture or a setting cannot be used.
        BundleError: there is no model, or it cannot be used.
    """
    pair = []
    for file in settings.pictures:
        picture, notes = read_picture(file)
        pair.append(picture)
        for line in notes:
            note(line)
    file = settings.model_file
    codec = load_model(file)
    weights_sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    alpha = _chosen_alpha(settings, weights_sha256)
    source = SymbolSource(codec, (pair[0], pair[1]), settings.snr_db, alpha, settings.cbr)
    decoder = decoder_graph(codec)
    job = Job(
        source=source,
        decoder=decoder,
        decoder_sha256=hashlib.sha256(decoder).hexdigest(),
        fades=settings.fading == "rayleigh",
        seed=settings.seed,
    )
    return Sending(settings, job, weights_sha256)


def _chosen_alpha(settings: BroadcastSettings, weights_sha256: str) -> float:
    """The first user's part of the waveform: as given, or as the model's quality law says for the aim."""
    if settings.alpha is not None:
        return settings.alpha
    law = load_law(LAW_FILE) if LAW_FILE.is_file() else None
    if law is None or law.weights_sha256 != weights_sha256:
        raise ConfigError(
            f"{settings.model_file}: alpha is chosen by a law of the model's quality, and there is none of this model; "
            "give --alpha a number"
        )
    return choose_alpha(settings.aim or "max-min", settings.snr_db, settings.cbr, law).alpha


async def broadcast(sending: Sending, progress: Progress, tell_token: TellToken) -> tuple[Audience, int]:
    """Send, and take back what was shown. Whatever ends this, nothing it started is left.

    Args:
        tell_token: told the join token and its file where devices come from elsewhere.
    Returns:
        Who showed what, and the bytes that went over the broadcast plane.
    Raises:
        ConfigError: a folder or key file cannot be used.
        TransportError: an address cannot be bound, or devices did not join in time.
        ChildError: a local device cannot be started.
        BundleError: the model gives no symbols.
    """
    settings = sending.settings
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wdmoe-broadcast-")))
        site = _elsewhere(settings) if settings.bind else _here(settings, folder)
        station = await stack.enter_async_context(BroadcastStation(sending.job, site))
        if settings.bind:
            tell_token(station.join_text, station.join_file)
            await station.run(progress)
        else:
            children: list[Child] = []
            stack.push_async_callback(_end, children)
            _start(children, folder, station.join_text)
            await station.run(progress, _watch(children, station.audience))
        return station.audience, station.bytes_on_air


def _elsewhere(settings: BroadcastSettings) -> Site:
    return Site(bind=settings.bind, state=settings.state, advertise=settings.advertise, wait_s=settings.wait_s)


def _here(settings: BroadcastSettings, folder: Path) -> Site:
    return Site(bind=LOCAL_BIND, state=folder / "state", names=NAMES, lease_s=_LOCAL_LEASE_S, wait_s=settings.wait_s)


def _start(children: list[Child], folder: Path, token_text: str) -> None:
    """Two device processes. Keys, logs and cache lie in `folder`."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(token_text)
    for name in NAMES:
        words = ["-v", "device", "--join", f"@{token}", "--name", name, "--threads", "1", "--provider", "cpu"]
        words += ["--state", str(folder / name), "--cache", str(folder / "cache"), "--memory", "64MiB"]
        children.append(Child(name, words, folder))


async def _watch(children: Sequence[Child], audience: Audience) -> None:
    """A device process that ended will not show anything any more: no need to wait for its lease."""
    while True:
        for child, listener in zip(children, audience, strict=True):
            try:
                child.check()
            except ChildError as error:
                listener.lose(f"its device {str(error).removeprefix(f'{child.name} ')}")
        await asyncio.sleep(_LOOK_S)


async def _end(children: list[Child]) -> None:
    await in_thread(lambda: end_all(children, _FAREWELL_S))
