"""A broadcast with two real device processes over CURVE: what comes is what the codec gives; one that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from tests.broadcast.test_broadcast_receiver import REPORT
from tests.broadcast.test_decoder import SMALL, shaken
from tests.lab.fleet import Device
from tests.lab.waiting import PATIENCE_S, free_ports
from wdmoe.broadcast.codec.image_file import read_picture
from wdmoe.broadcast.codec.model import ModelSettings
from wdmoe.broadcast.codec.model_file import save_model
from wdmoe.broadcast.codec.receiver import Ear
from wdmoe.broadcast.codec.tiling import Blender
from wdmoe.broadcast.quality.operating_point import choose_alpha
from wdmoe.broadcast.quality.quality_law import LAW_FILE, load_law
from wdmoe.errors import BundleError, ConfigError, TransportError, WdmoeError
from wdmoe.nodes.broadcast_station.listeners import Audience
from wdmoe.nodes.broadcast_station.results import prepare_folder, write_results
from wdmoe.nodes.broadcast_station.run import Sending, broadcast, prepare
from wdmoe.nodes.broadcast_station.settings import SHIPPED_MODEL, BroadcastSettings
from wdmoe.nodes.broadcast_station.station import BroadcastStation, Progress, Site
from wdmoe.nodes.device.join import introduce
from wdmoe.transport.codec.messages import Fetch, Hello, Rows, Tune, Tuned
from wdmoe.transport.security.keys import new_key_pair
from wdmoe.transport.zmq.channels import open_control_link
from wdmoe.transport.zmq.sockets import LinkSecurity, new_context

COMMAND = [sys.executable, "-m", "wdmoe", "broadcast"]
LEAST = ModelSettings(  # a quarter of the tokens: there are 20,000 tiles
    patch=8, width=8, heads=2, encoder_depth=1, decoder_depth=1, condition=4, slots=16
)
ONE_LEVEL = 1  # of 255: what rounding may leave between ONNX Runtime and PyTorch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that nobody trained: what comes is compared with what the codec gives, not with what was sent."""
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(shaken(SMALL), file)
    return file


def a_picture(file: Path, height: int, width: int) -> Path:
    down, right = np.mgrid[0:height, 0:width]
    picture = np.stack([right * 255 // width, down * 255 // height, (right + down) % 256], axis=-1)
    Image.fromarray(picture.astype(np.uint8)).save(file)
    return file


def settings(folder: Path, model: Path, sizes: tuple[tuple[int, int], ...], **changes: object) -> BroadcastSettings:
    pictures = tuple(a_picture(folder / f"{user}.png", *size) for user, size in enumerate(sizes))
    return BroadcastSettings(pictures=pictures, out=folder / "out", model=model, cbr=1 / 12, alpha=0.4, **changes)


def run(
    sending: Sending, progress: Progress = lambda what, done: None, patience_s: float = PATIENCE_S
) -> tuple[Audience, int]:
    async def bounded() -> tuple[Audience, int]:
        return await asyncio.wait_for(broadcast(sending, progress, print), patience_s)

    return asyncio.run(bounded())


def expected(sending: Sending, user: int) -> np.ndarray:
    """The user's picture as PyTorch decodes it, from the same symbols through the same channel."""
    source, job = sending.job.source, sending.job
    plan, codec = source.plan, source.codec
    grid, kept = plan.grids[user], codec.settings.kept(source.cbr)
    ear = Ear(user=user, snr_db=source.snr_db[user], fades=job.fades, seed=job.seed)
    alphas = plan.alpha(0, plan.blocks, source.alpha)
    shares = 1 - alphas if user else alphas
    blender, pieces = Blender(grid), []
    for number in range(grid.tiles):
        heard, snr_db = ear.hear(number, source.symbols(number, number + 1)[0])
        slots = torch.zeros(1, codec.settings.tokens, codec.settings.slots, 2)
        slots[0, :, :kept] = torch.from_numpy(heard.reshape(-1, kept, 2))
        told = (torch.tensor([snr_db]), torch.tensor([shares[number]]), torch.tensor([float(kept)]))
        with torch.no_grad():
            tile = codec.decode(slots, *told, torch.tensor([float(user)]))[0].permute(1, 2, 0).numpy()
        pieces.append(blender.add(number, tile * 255))
    return np.concatenate([*pieces, blender.finish()])


def is_as_expected(sending: Sending, user: int, got: np.ndarray | None) -> None:
    assert got is not None
    wanted = expected(sending, user)
    assert got.shape == wanted.shape
    assert np.abs(got.astype(int) - wanted).max() <= ONE_LEVEL
    assert np.ptp(wanted) > 50 or wanted.shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("sizes", "fading"), [(((90, 130), (40, 33)), "rayleigh"), (((1, 1), (33, 200)), "awgn")], ids=["large", "tiny"]
)
def test_both_pictures_come_back_as_the_codec_gives_them(
    tmp_path: Path, model: Path, sizes: tuple[tuple[int, int], ...], fading: str
) -> None:
    sending = prepare(settings(tmp_path, model, sizes, fading=fading, seed=3), print)
    stages: list[str] = []
    audience, size = run(sending, lambda what, done: stages.append(what))
    for listener in audience:
        assert (listener.state, listener.reason) == ("shown", "")
        assert listener.shown is not None
        assert listener.shown.lost == 0
        is_as_expected(sending, listener.user, listener.picture)
    assert list(dict.fromkeys(stages))[-2:] == ["sending", "receiving"]
    source = sending.job.source
    assert size >= source.plan.blocks * source.uses * 4  # float16, both parts; sent once for both


@pytest.mark.slow
def test_the_largest_picture_beside_the_smallest(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    save_model(shaken(LEAST), model)
    sending = prepare(settings(tmp_path, model, ((3000, 4000), (1, 1))), print)
    audience, _ = run(sending, patience_s=PATIENCE_S)
    assert [(listener.state, listener.reason) for listener in audience] == [("shown", ""), ("shown", "")]
    large, small = audience
    assert large.shown is not None
    assert (large.shown.heard, large.shown.lost) == (125 * 167, 0)
    assert large.picture is not None
    assert large.picture.shape == (3000, 4000, 3)
    is_as_expected(sending, 1, small.picture)


def device_process(name: str) -> psutil.Process:
    return next(each for each in psutil.Process().children(recursive=True) if name in each.cmdline())


def test_one_device_killed_in_the_middle_leaves_the_other_unharmed(tmp_path: Path, model: Path) -> None:
    plan = settings(tmp_path, model, ((180, 260), (180, 260)))
    sending = prepare(plan, print)
    killed: list[int] = []

    def progress(what: str, done: float) -> None:
        if what == "sending" and not killed:
            assert 0 < done < 1
            victim = device_process("user-2")
            victim.kill()
            killed.append(victim.pid)

    audience, _ = run(sending, progress)
    assert killed
    one, other = audience
    is_as_expected(sending, 0, one.picture)
    assert one.shown is not None
    assert one.shown.lost == 0
    assert (other.state, other.picture) == ("lost", None)
    assert other.reason.startswith("its device ended (signal SIGKILL)")
    prepare_folder(plan.out)
    document, users = write_results(sending, audience, 0)
    assert [user["state"] for user in document["users"]] == ["shown", "lost"]
    assert document == json.loads((plan.out / "result.json").read_text())
    assert sorted(os.listdir(plan.out)) == ["received-1.png", "result.json", "sheet.png"]
    assert "lost; its device ended (signal SIGKILL)" in users[1].line()


def test_both_devices_killed_end_it_at_once(tmp_path: Path, model: Path) -> None:
    sending = prepare(settings(tmp_path, model, ((180, 260), (180, 260))), print)

    def progress(what: str, done: float) -> None:
        if what == "tuning in":
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):  # told twice, the second time they are dead
                    if "device" in child.cmdline():  # joblib of an earlier test may have a child, too
                        child.kill()

    audience, _ = run(sending, progress)
    assert [listener.state for listener in audience] == ["lost", "lost"]


def test_devices_that_never_come(tmp_path: Path, model: Path) -> None:
    plan = settings(tmp_path, model, ((9, 9), (9, 9)), bind="tcp://127.0.0.1:*", state=tmp_path / "bs", wait_s=0.3)
    with pytest.raises(TransportError, match=r"2 of 2 devices did not join within 0 s"):
        run(prepare(plan, print))


def test_alpha_is_chosen_by_the_law_of_the_shipped_model_only(tmp_path: Path, model: Path) -> None:
    sizes, law = ((32, 32), (32, 32)), load_law(LAW_FILE)

    def alpha(aim: str, **changes: object) -> float:
        chosen = dataclasses.replace(settings(tmp_path, SHIPPED_MODEL, sizes), alpha=None, aim=aim, **changes)
        return prepare(chosen, print).job.source.alpha

    assert alpha("") == choose_alpha("max-min", (10.0, 5.0), 1 / 12, law).alpha
    assert alpha("target:24dB@1") != alpha("")
    with pytest.raises(ConfigError, match="cannot have 60 dB"):
        alpha("target:60dB@1")
    with pytest.raises(ConfigError, match="aim must be"):
        alpha("best")
    with pytest.raises(ConfigError, match="give --alpha a number"):
        prepare(dataclasses.replace(settings(tmp_path, model, sizes), alpha=None), print)


def test_a_waveform_that_is_none(tmp_path: Path, model: Path) -> None:
    """A damaged model: devices are not left waiting."""
    sending = prepare(settings(tmp_path, model, ((9, 9), (9, 9))), print)
    with torch.no_grad():
        sending.job.source.codec.fusion.out.head[2].weight.fill_(float("nan"))
    with pytest.raises(BundleError, match="symbols are not of mean power 1"):
        run(sending)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"snr_db": (10.0, 50.0)}, "snr must be from -30 to 40 dB, got 50"),
        ({"snr_db": (float("nan"), 5.0)}, "snr must be from -30 to 40 dB, got nan"),
        ({"alpha": 0.5, "aim": "fair"}, "leave out one of them"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1 or auto"),
        ({"alpha": float("nan")}, "alpha must be from 0 to 1 or auto"),
        ({"cbr": 0.0}, "cbr must be above 0"),
        ({"cbr": 0.15}, "cbr must be a multiple of 1/48"),
        ({"cbr": 1.0}, "cbr must be a multiple of 1/48 up to 8"),
        ({"fading": "rician"}, "fading must be one of awgn, rayleigh"),
        ({"wait_s": 0.0}, "the wait for devices must be positive"),
        ({"pictures": (Path("gone.png"), Path("gone.png"))}, r"gone\.png: No such file"),
        ({"model": Path(__file__)}, "not a broadcast model"),
        ({"model": Path("gone")}, "not a broadcast model"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_starts(
    tmp_path: Path, model: Path, changes: dict[str, object], reason: str
) -> None:
    plan = settings(tmp_path, model, ((9, 9), (9, 9)))
    with pytest.raises(WdmoeError, match=reason):
        prepare(dataclasses.replace(plan, **changes), print)


def test_without_a_model_it_says_how_to_get_one(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wdmoe.nodes.broadcast_station.settings.SHIPPED_MODEL", tmp_path / "codec.safetensors")
    plan = dataclasses.replace(settings(tmp_path, model, ((9, 9), (9, 9))), model=None)
    with pytest.raises(BundleError, match="--model FILE"):
        prepare(plan, print)
    save_model(shaken(SMALL), tmp_path / "codec.safetensors")
    assert prepare(plan, print).job.decoder


def test_a_folder_that_cannot_be_written_and_old_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        prepare_folder(tmp_path / "file")
    for name in ("received-2.png", "result.json", "mine.txt"):
        (tmp_path / name).write_text("old")
    prepare_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["file", "mine.txt"]


# ---- the command


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "temporary").mkdir()
    return {**os.environ, "TMPDIR": str(tmp_path / "temporary")}


def left_behind(environment: dict[str, str]) -> list[str]:
    return [name for name in os.listdir(environment["TMPDIR"]) if name.startswith("wdmoe")]


@pytest.mark.slow
def test_the_command(tmp_path: Path, model: Path, environment: dict[str, str]) -> None:
    one = a_picture(tmp_path / "one.png", 50, 60)
    Image.new("LA", (30, 20), (200, 0)).save(tmp_path / "two.png")
    words = [*COMMAND, str(one), str(tmp_path / "two.png"), "--model", str(model), "--out", str(tmp_path / "out")]
    words += ["--cbr", "1/12", "--snr", "12,3", "--alpha", "0.25", "--json"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{tmp_path / 'two.png'} is partly transparent: it is laid on white\n"
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "out" / "result.json").read_text())
    assert (document["alpha"], document["blocks"], document["shared_blocks"]) == (0.25, 6, 1)
    assert document["complex_symbols"] == 6 * 256
    first, second = document["users"]
    assert (first["snr_db"], second["snr_db"], second["width"], second["height"]) == (12, 3, 30, 20)
    plan = BroadcastSettings(
        pictures=(one, tmp_path / "two.png"), out=tmp_path, model=model, snr_db=(12, 3), alpha=0.25, cbr=1 / 12
    )
    sending = prepare(plan, print)
    for user, entry in enumerate(document["users"]):
        picture, _ = read_picture(tmp_path / "out" / entry["received"])
        is_as_expected(sending, user, picture)
        assert 0 < entry["psnr_db"] < 100
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.format == "PNG"
    assert left_behind(environment) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_nothing(
    tmp_path: Path, model: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    picture = str(a_picture(tmp_path / "one.png", 900, 900))
    words = [
        *COMMAND,
        picture,
        picture,
        "--model",
        str(model),
        "--out",
        str(tmp_path / "out"),
        "--cbr",
        "1/12",
        "--alpha",
        "0.5",
    ]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        limit_s = time.monotonic() + PATIENCE_S
        while not (children := psutil.Process(process.pid).children()):
            assert time.monotonic() < limit_s
            time.sleep(0.05)
        time.sleep(1.0)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert out == ""
    assert not [each for each in children if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert left_behind(environment) == []


def test_a_device_that_says_nonsense_is_given_up_and_the_other_unharmed(tmp_path: Path, model: Path) -> None:
    """An admitted key, the right messages, and rows of another picture."""
    sending = prepare(settings(tmp_path, model, ((60, 60), (40, 40))), print)
    rogue_keys = new_key_pair()

    async def rogue(station: BroadcastStation) -> None:
        station._state.admission.admit(rogue_keys.public, "rogue")
        context = new_context()
        link = open_control_link(context, station._endpoints[0], LinkSecurity(station._state.keys.public, rogue_keys))
        try:
            await introduce(link, Hello(session=1, report=dataclasses.replace(REPORT, name="rogue")))
            while not isinstance(tune := (await link.receive()).message, Tune):
                pass
            await link.send(Fetch(layer=3, expert=0, offset=0, length=1 << 30))
            await link.send(Fetch(layer=0, expert=0, offset=2**62, length=100))
            await link.send(Rows(broadcast=tune.broadcast + 1, first=0, pixels=np.zeros((1, 1, 3), np.uint8)))
            await link.send(Tuned(broadcast=tune.broadcast))
            await link.send(Rows(broadcast=tune.broadcast, first=0, pixels=np.zeros((999, 40, 3), np.uint8)))
            while True:
                await link.receive()
        finally:
            link.close()
            context.destroy(0)

    async def scene() -> Audience:
        site = Site(
            bind="tcp://127.0.0.1:*",
            state=tmp_path / "bs",
            names=("honest", "rogue"),
            lease_s=PATIENCE_S,  # the rogue does not beat
            wait_s=PATIENCE_S,
        )
        async with BroadcastStation(sending.job, site) as station:
            honest = Device(tmp_path, "honest", station.join_text, "--memory", "64MiB", "--provider", "cpu")
            try:
                await station.run(lambda what, done: None, rogue(station))
            finally:
                honest.kill()
            return station.audience

    one, other = asyncio.run(asyncio.wait_for(scene(), PATIENCE_S))
    is_as_expected(sending, 0, one.picture)
    assert other.state == "lost"
    assert other.reason == "its device sent rows 0 to 999 of 40 pixels, where row 0 of 40x40 is due"


@pytest.fixture
def devices() -> Iterator[list[Device]]:
    started: list[Device] = []
    yield started
    for device in started:
        device.stop()


@pytest.mark.slow
def test_real_devices_join_by_token_and_stay_for_the_next_one(
    tmp_path: Path, model: Path, devices: list[Device]
) -> None:
    picture = str(a_picture(tmp_path / "one.png", 60, 60))
    words = [
        *COMMAND,
        picture,
        picture,
        "--model",
        str(model),
        "--cbr",
        "1/12",
        "--alpha",
        "0.5",
        "--state",
        str(tmp_path / "bs"),
    ]
    words += ["--bind", f"tcp://127.0.0.1:{free_ports(2)}", "--out", str(tmp_path / "out"), "--print-token"]
    for turn in (1, 2):
        with (tmp_path / f"{turn}.log").open("w") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            limit_s = time.monotonic() + PATIENCE_S
            while not (found := re.search(r"secret\): (\S+)\n", (tmp_path / f"{turn}.log").read_text())):
                assert process.poll() is None, (tmp_path / f"{turn}.log").read_text()
                assert time.monotonic() < limit_s
                time.sleep(0.05)
            while len(devices) < 2:
                flags = ("--save-pictures", str(tmp_path / "saved"), "--memory", "64MiB", "--provider", "cpu")
                devices.append(Device(tmp_path, f"device{len(devices)}", found[1], *flags))
            assert process.wait(PATIENCE_S) == 0, (tmp_path / f"{turn}.log").read_text()
        finally:
            process.kill()
            process.wait()
        log_lines = (tmp_path / f"{turn}.log").read_text()
        assert "user 1: " in log_lines
        assert "user 2: " in log_lines
    saved = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert [name[-10:] for name in saved].count("user-1.png") == 2
    assert len(saved) == 4
    returned = [read_picture(tmp_path / "out" / f"received-{user}.png")[0] for user in (1, 2)]
    for user, picture_back in zip((1, 2), returned, strict=True):
        for name in saved:
            if name.endswith(f"user-{user}.png"):
                assert np.array_equal(read_picture(tmp_path / "saved" / name)[0], picture_back)
