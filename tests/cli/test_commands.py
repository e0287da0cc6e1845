"""The command as people run it: a process, its exit code, what it prints where."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.lab.command import fails, run, run_here
from tests.lab.serving_bench import EchoEngine, serving
from tests.lab.waiting import PATIENCE_S
from wdmoe.cli.failures import explain
from wdmoe.errors import BundleError

COMMANDS = ["broadcast", "bs", "demo", "device", "export", "place", "split", "status", "token", "trace", "verify"]


def test_help_teaches_every_command():
    overview = run("--help")
    assert overview.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in overview.stdout
        text = run_here(command, "--help").stdout
        assert "Example" in text or command == "token"
    assert "Example" in run_here("token", "create", "--help").stdout


def test_help_loads_nothing_heavy():
    heavy = "torch transformers onnxruntime onnx zmq fastapi rich numpy"
    code = f"""
        import sys
        from click.testing import CliRunner
        from wdmoe.cli.main import cli
        for words in [], *([name] for name in cli.commands):
            assert CliRunner().invoke(cli, [*words, "--help"]).exit_code == 0
        print(sorted(set("{heavy}".split()) & set(sys.modules)))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert result.stdout.strip() == "[]"


def test_version():
    result = run("--version")
    assert (result.returncode, result.stdout.split()[0]) == (0, "wdmoe-node,")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fly"], "No such command"),
        (["device"], "--join"),
        (["device", "--join", "x", "--memory", "5"], "the unit is missing"),
        (["device", "--join", "x", "--downlink", "5MHz"], "20Mbit/s"),
        (["device", "--join", "@/no/such/file"], "/no/such/file"),
        (["device", "--join", "x", "--provider", "abacus"], "abacus"),
        (["bs", "x", "--http", "nowhere"], "127.0.0.1:8080"),
        (["bs", "x", "--http", "host:99999"], "127.0.0.1:8080"),
        (["bs", "x", "--deadline", "-1s"], "not negative"),
        (["status", "--url", "file:///etc/passwd"], "http://127.0.0.1:8080"),
        (["export", "a", "b", "--precision", "int3"], "int3"),
    ],
)
def test_wrong_usage_ends_with_2(words, says):
    result = run_here(*words)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [
        (["bs", "x"], "fastapi", "bs"),
        (["bs", "x"], "tokenizers", "bs"),
        (["bs", "x", "--engine", "transformers"], "torch", "export"),
        (["bs", "x", "--record-trace", "gate.npz"], "transformers", "export"),
        (["export", "a", "b"], "torch", "export"),
        (["split", "a", "b"], "torch", "export"),
        (["trace", "default", "gate.npz"], "torch", "export"),
        (["verify", "x"], "onnx", "bs"),
        (["device", "--join", "x"], "onnxruntime", "device"),
    ],
)
def test_a_missing_extra_is_named(words, missing, extra):
    line = fails(run(*words, before=f"import sys; sys.modules['{missing}'] = None"))
    assert f"needs {missing}" in line
    assert f"pip install 'wdmoe[{extra}]'" in line


def test_a_folder_that_is_no_bundle(tmp_path):
    assert str(tmp_path) in fails(run_here("verify", str(tmp_path)))
    assert "no-such" in fails(run_here("verify", str(tmp_path / "no-such")))


def test_a_folder_that_is_no_model(tmp_path):
    assert str(tmp_path) in fails(run_here("export", str(tmp_path), str(tmp_path / "out")))


def test_tokens_are_made_listed_and_revoked(tmp_path):
    from wdmoe.transport.security.admission import Admission
    from wdmoe.transport.security.join_tokens import parse_token
    from wdmoe.transport.security.keys import new_key_pair

    state = ("--state", str(tmp_path / "bs"))
    create = ("token", "create", *state, "--endpoint", "tcp://192.0.2.7:5555", "--ttl", "10min", "--uses", "1")
    made = run_here(*create, "--new")
    assert made.returncode == 0
    assert parse_token(made.stdout).endpoints == ("tcp://192.0.2.7:5555",)
    everywhere = parse_token(run("token", XDG_STATE_HOME=str(tmp_path)).stdout)
    assert all(each.endswith(":5555") for each in everywhere.endpoints)

    Admission(tmp_path / "bs").admit(new_key_pair().public, "kitchen\x1b[31m")
    listed = run_here("token", "list", *state).stdout
    assert "kitchen" in listed
    assert "\x1b" not in listed
    assert "no admitted device" in fails(run_here("token", "revoke", *state, "attic"))
    assert run_here("token", "revoke", *state, "kitchen\x1b[31m").returncode == 0
    assert "kitchen" not in run_here("token", "list", *state).stdout


@pytest.mark.parametrize("words", [("create",), ("list",), ("list", "--json"), ("revoke", "kitchen")])
def test_looking_into_no_state_folder_makes_none(tmp_path, words):
    """A typo made a new identity, and a token of it that opens no door, with exit code 0."""
    line = fails(run_here("token", *words, "--state", str(tmp_path / "typo")))
    assert f"{tmp_path / 'typo'} is no state folder of a base station" in line
    if words != ("create",):  # that may come before the first start, where the folder cannot be a typo
        assert "no state folder" in fails(run("token", *words, XDG_STATE_HOME=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_tokens_as_json(tmp_path):
    from wdmoe.transport.security.join_tokens import parse_token
    from wdmoe.transport.security.keys import fingerprint, new_key_pair
    from wdmoe.transport.security.station_state import open_state

    folder = str(tmp_path / "bs")
    state, endpoint = ("--state", folder), "tcp://192.0.2.7:5555"
    made = json.loads(run_here("token", "create", *state, "--new", "--endpoint", endpoint, "--json").stdout)
    token = parse_token(made.pop("token"))
    marks = {"fingerprint": token.enrolment.fingerprint, "expires_unix": int(token.expires_unix)}
    assert made == {**marks, "endpoints": [endpoint], "uses": 64, "state": folder}
    unlimited = run_here("token", "create", *state, "--uses", "unlimited", "--ttl", "48h", "--json").stdout
    assert json.loads(unlimited)["uses"] is None

    key = new_key_pair().public
    open_state(tmp_path / "bs").admission.admit(key, "kitchen")
    listed = json.loads(run_here("token", "list", *state, "--json").stdout)
    assert listed["tokens"][0] == {**marks, "uses_left": 64}
    assert listed["tokens"][1]["uses_left"] is None
    [device] = listed["devices"]
    assert device.pop("admitted_unix") > 1e9
    assert device == {"name": "kitchen", "fingerprint": fingerprint(key), "key": key}

    gone = json.loads(run_here("token", "revoke", *state, "kitchen", "--json").stdout)
    assert gone == {"revoked": [{"name": "kitchen", "fingerprint": fingerprint(key)}], "state": folder}
    assert json.loads(run_here("token", "list", *state, "--json").stdout) == {"devices": [], "tokens": []}
    for uses in ("0", "-1", "many", "1.5", ""):
        assert run_here("token", "create", *state, "--uses", uses).returncode == 2


def test_a_list_with_a_part_that_cannot_be_read_is_not_passed_off_as_whole(tmp_path):
    state = ("--state", str(tmp_path / "bs"))
    assert run_here("token", "create", *state, "--new").returncode == 0
    (tmp_path / "bs" / "devices" / "0123456789abcdef.json").write_text("{")
    listed = run_here("token", "list", *state)
    assert listed.returncode == 1
    assert "1 files of" in listed.stderr
    (tmp_path / "bs" / "devices").rename(tmp_path / "aside")
    for words in (("list",), ("create",), ("revoke", "kitchen")):
        assert "devices: No such file or directory" in fails(run_here("token", *words, *state))
    assert not (tmp_path / "bs" / "devices").exists()


def test_an_empty_key_is_not_the_same_as_none(tmp_path):
    """A key file that was empty, or a variable that was not set, opened the API to everybody."""
    (tmp_path / "key.txt").write_text("\n")
    for key, what in ((f"@{tmp_path / 'key.txt'}", "key.txt is empty"), ("", "it is empty"), (" ", "it is empty")):
        refused = run_here("bs", "default", "--api-key", key, "--state", str(tmp_path / "bs"))
        assert refused.returncode == 2
        assert what in refused.stderr
    assert "is empty" in run_here("device", "--join", "").stderr


def test_names_and_keys_that_begin_with_a_dash(tmp_path):
    from wdmoe.transport.security.keys import new_key_pair
    from wdmoe.transport.security.station_state import make_or_open_state

    state = ("--state", str(tmp_path / "bs"))
    admission = make_or_open_state(tmp_path / "bs").admission
    key = next(pair.public for pair in iter(new_key_pair, None) if pair.public.startswith("-"))
    for name, revoked in (("-hall", "-hall"), ("--help-desk", "--help-desk"), ("attic", key)):
        admission.admit(key, name)
        for words in ((revoked, *state), (*state, revoked), (*state, "--", revoked)):
            admission.admit(key, name)
            gone = run("token", "revoke", *words)
            assert f"{name} (" in gone.stdout, gone.stderr
    assert "Shut out DEVICE" in run("token", "revoke", "-h").stdout
    assert run("token", "revoke", *state).returncode == 2
    assert "wdmoe1" in fails(run("device", "--name", "-hall", "--join", "-secret", *state))


def test_a_state_folder_that_cannot_be(tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    assert str(blocker) in fails(run_here("token", "create", "--state", str(blocker / "bs")))


def test_status_shows_a_running_base_station():
    engine = EchoEngine()
    with serving(engine, api_key="geheim") as server:
        shown = run("status", "--url", server.url, "--api-key", "geheim")
        machine = run("status", "--url", f"{server.url}/", "--json", WDMOE_API_KEY="geheim")
        refused = run_here("status", "--url", server.url)
        nowhere = run_here("status", "--url", f"{server.url}/elsewhere", "--api-key", "geheim")
        placement = run_here("status", "--url", server.url, "--api-key", "geheim", "--print-placement")
    assert shown.returncode == 0
    assert "echo-moe" in shown.stdout
    assert "kitchen" in shown.stdout
    assert json.loads(machine.stdout)["devices"][1]["name"] == "attic"
    assert "--api-key" in fails(refused)
    assert "answered 404" in fails(nowhere)
    assert json.loads(placement.stdout)["format"] == 1


def test_status_names_devices_in_the_order_that_people_count():
    engine = EchoEngine()
    engine.devices = ["device10", "Device2", "kitchen", "device1"]
    with serving(engine) as server:
        shown = run_here("status", "--url", server.url).stdout
        machine = json.loads(run_here("status", "--url", server.url, "--json").stdout)
    rows = [line.split()[0] for line in shown.splitlines() if line.split() and line.split()[0] in engine.devices]
    assert rows == ["device1", "Device2", "device10", "kitchen"]
    assert [device["name"] for device in machine["devices"]] == engine.devices


def test_status_shows_who_is_in_quarantine():
    engine = EchoEngine()
    engine.checks = {"devices": [{"name": "attic", "lies": 2, "quarantined": True, "attached": True}]}
    with serving(engine) as server:
        shown = run("status", "--url", server.url, COLUMNS="200").stdout
    assert "lies" in shown
    assert "quarantined" in next(line for line in shown.splitlines() if "attic" in line)


def test_status_of_nothing(free_port):
    assert f"127.0.0.1:{free_port}" in fails(run("status", "--url", f"http://127.0.0.1:{free_port}"))


def test_a_bug_keeps_its_traceback():
    broken = "import click, wdmoe.cli.status as s; s._get_status = lambda *_: 1 / 0"
    result = run("status", before=broken)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BundleError("two\nlines"), "two lines"),
        (OSError(28, "No space left on device", "/data/x"), "/data/x: no space left on the disk"),
        (PermissionError(13, "Permission denied", "/data/x"), "/data/x: permission denied"),
        (OSError(28, "No space left on device"), "writing or reading a file: no space left on the disk"),
        (FileNotFoundError(2, "No such file", "a", None, "b"), "a -> b: no such file or folder"),
        (ZeroDivisionError("bug"), None),
        (ConnectionResetError(104, "reset"), None),
    ],
)
def test_what_is_a_stated_failure(error, line):
    assert explain(error) == line


STUBBORN = """
    import asyncio
    from wdmoe.cli.running import run_until_stopped
    async def program():
        print("up", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            print("cleaning", flush=True)
            await asyncio.sleep({cleaning_s})
            print("clean", flush=True)
    run_until_stopped(program())
    print("done")
"""


def _start(cleaning_s: float) -> subprocess.Popen[str]:
    code = textwrap.dedent(STUBBORN.format(cleaning_s=cleaning_s))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_program_after_its_clean_up(number):
    process = _start(cleaning_s=0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (0, "cleaning\nclean\ndone\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_clean_up_that_hangs(number):
    process = _start(cleaning_s=3600)
    process.send_signal(number)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert "clean\n" not in out


def test_a_second_interrupt_wakes_a_loop_that_is_about_to_sleep():
    """One in a thousand comes between the last look for signals and the sleep; nothing woke the loop for an hour."""
    code = """
        import asyncio, os, signal
        from wdmoe.cli.running import run_until_stopped
        async def program():
            os.kill(os.getpid(), signal.SIGINT)
            try:
                await asyncio.Event().wait()
            finally:
                pipe = signal.set_wakeup_fd(-1)
                print(pipe >= 0, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
                signal.set_wakeup_fd(pipe)
        run_until_stopped(program())
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert result.stdout == "True True\n"


def test_a_cancel_from_inside_is_not_taken_for_a_signal():
    code = """
        import asyncio
        from wdmoe.cli.running import run_until_stopped
        async def program():
            raise asyncio.CancelledError
        run_until_stopped(program())
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert result.returncode == 1
    assert "CancelledError" in result.stderr
