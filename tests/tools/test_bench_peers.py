"""The comparison with llama.cpp: what its programs are told, what is made of their answers, and how it all ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

from tests.lab.waiting import PATIENCE_S, free_ports
from tools.bench.rivals.figures import Rounds
from tools.bench.rivals.orders import Work, batched_words, bench_words, overrides, read_batched, read_bench
from tools.bench.rivals.programs import PeerError, find_programs
from tools.bench.rivals.weights import blocks_of, check_same, open_gguf

BLOCKS = 4
TEST: dict[str, Any] = {
    "build_commit": "0c1e57098",
    "build_number": 1,
    "model_type": "granitemoe ?B all F32",
    "n_gen": 64,
    "avg_ts": 12.5,
    "samples_ts": [12.5],
}
BENCH = f"""#!/bin/sh
echo "$@" >> "$0.asked"
echo '[ggml] a library says something'
cat <<'END'
{json.dumps([TEST], indent=2)}
END
"""
LINES = """
{"pp": 32, "tg": 32, "pl": 1, "t_pp": 1.0, "t_tg": 3.0}
{"pp": 32, "tg": 32, "pl": 8, "t_pp": 2.0, "t_tg": 6.0}
"""
BATCHED = f"""#!/bin/sh
echo "$@" >> "$0.asked"
cat <<'END'{LINES}END
"""
HANG = """#!/bin/sh
sleep 1000 &
echo $$ $! > "$0.pids"
wait
"""
SERVER = f"""#!{sys.executable}
import socket, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((words["-H"], int(words["-p"])))
    listener.listen()
    while True:
        listener.accept()[0].close()
        if MORTAL:
            time.sleep(1)
            sys.exit("out of memory")
"""


def program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Programs as llama.cpp has them, and `model.gguf` beside them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "llama-bench", BENCH)
    program(folder / "llama-batched-bench", BATCHED)
    program(folder / "ggml-rpc-server", SERVER.replace("MORTAL", "False"))
    write_gguf(tmp_path / "model.gguf", {f"blk.{n}.ffn_up_exps.weight": np.ones((2, 3, 4)) for n in range(BLOCKS)})
    return folder


def write_gguf(file: Path, tensors: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(file, "granitemoe")
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def command(folder: Path, *words: str) -> list[str]:
    """Without wdmoe, where words don't say otherwise."""
    tool = Path(__file__).resolve().parents[2] / "tools/bench/peers"
    model = str(folder.parent / "model.gguf")
    usual = ["--only", "llama.cpp", "llama.cpp-rpc", "--threads", "1", "--rounds", "2", "--settle", "0"]
    return [sys.executable, str(tool), str(folder), "--gguf", model, *usual, *words]


def ran(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *words), capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def complaint(folder: Path, *words: str) -> str:
    """The one line that it ends with."""
    done = ran(folder, *words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def asked(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.asked").read_text().splitlines()


# ---- what the programs are told ----


def test_each_block_has_one_server() -> None:
    hosts = ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:4"]
    found = overrides(30, hosts)
    assert found[0] == r"blk\.(0|1|2|3|4|5|6|7)\.ffn_.*_exps=RPC0[127.0.0.1:1]"
    assert found[3] == r"blk\.(22|23|24|25|26|27|28|29)\.ffn_.*_exps=RPC0[127.0.0.1:4]"
    patterns = [each.split("=")[0] for each in found]
    for block in range(30):
        for kind in ("gate", "up", "down"):
            name = f"blk.{block}.ffn_{kind}_exps.weight"
            assert sum(bool(re.search(pattern, name)) for pattern in patterns) == 1
    others = ("blk.1.ffn_up_shexp.weight", "blk.1.ffn_gate_inp.weight", "blk.30.ffn_up_exps.weight", "output.weight")
    assert not any(re.search(pattern, name) for pattern in patterns for name in others)


@pytest.mark.parametrize("blocks", [1, 4, 5, 7, 30])
def test_every_server_holds_something(blocks: int) -> None:
    found = overrides(blocks, [f"h:{n}" for n in range(min(blocks, 4))])
    numbers = [int(block) for each in found for block in re.findall(r"\d+", each.split("\\.ffn")[0])]
    assert numbers == list(range(blocks))


@pytest.mark.parametrize("count", [0, 5])
def test_there_cannot_be_more_servers_than_blocks(count: int) -> None:
    with pytest.raises(PeerError, match="from 1 to 4 servers"):
        overrides(4, ["h:1"] * count)


def test_the_two_programs_separate_servers_differently(tmp_path: Path) -> None:
    work = Work(gguf=tmp_path / "m.gguf", blocks=2, threads=3, hosts=("h:1", "h:2"))
    bench = bench_words(Path("llama-bench"), work, 32, 64)
    batched = batched_words(Path("llama-batched-bench"), work, 32, 16, [1, 8])
    first, second = r"blk\.(0)\.ffn_.*_exps=RPC0[h:1]", r"blk\.(1)\.ffn_.*_exps=RPC0[h:2]"
    assert bench[bench.index("-ot") + 1] == f"{first};{second}"
    assert batched[batched.index("-ot") + 1] == f"{first},{second}"
    # The servers must be known before they are named.
    assert bench.index("--rpc") < bench.index("-ot")
    assert batched.index("--rpc") < batched.index("-ot")
    assert batched[batched.index("-c") + 1] == str(8 * 48)
    alone = bench_words(Path("llama-bench"), Work(gguf=tmp_path / "m.gguf", blocks=2, threads=3), 32, 64)
    assert "--rpc" not in alone
    assert "-ot" not in alone


# ---- what they answer ----


def test_the_rate_is_read_behind_what_libraries_print() -> None:
    rate = read_bench("[rpc] ready\n" + json.dumps([TEST], indent=2))
    assert (rate.tokens_per_s, rate.build, rate.model) == (12.5, "1 (0c1e57098)", "granitemoe ?B all F32")


@pytest.mark.parametrize(
    "out",
    [
        "",
        "no such model",
        "[]",
        json.dumps([TEST, TEST]),
        json.dumps([{**TEST, "avg_ts": 0}]),
        json.dumps([{**TEST, "avg_ts": float("nan")}]),
        json.dumps([{**TEST, "avg_ts": None}]),
        json.dumps([{name: value for name, value in TEST.items() if name != "build_commit"}]),
        json.dumps([7]),
        json.dumps(TEST),
        json.dumps([TEST], indent=2)[:-20],
    ],
)
def test_anything_else_is_refused(out: str) -> None:
    with pytest.raises(PeerError, match="did not print the JSON of one test"):
        read_bench(out)


def test_rates_of_many_clients_count_the_prompts_time() -> None:
    assert read_batched(LINES, [1, 8]) == {1: 8.0, 8: 32.0}
    with pytest.raises(PeerError, match="nothing for 32 clients"):
        read_batched(LINES, [8, 32])


@pytest.mark.parametrize("line", ['{"pl": 1}', '{"pl": 1, "tg": 8, "t_pp": 0, "t_tg": 0}', "{", '{"pl": "many"}'])
def test_a_line_of_another_form_is_refused(line: str) -> None:
    with pytest.raises(PeerError, match="another form"):
        read_batched(line, [1])


def test_ratios_are_of_one_round_and_precision() -> None:
    rounds = Rounds()
    for name, precision, rates in (("a", "fp32", (1.0, 2.0)), ("b", "fp32", (3.0, 4.0)), ("b", "int8", (5.0, 5.0))):
        for rate in rates:
            rounds.add("one client", (name, precision), rate)
    found = rounds.figures([("b", "int8"), ("a", "fp32"), ("b", "fp32")], "a")["one client"]
    assert list(found) == ["b int8", "a fp32", "b fp32"]
    assert found["b fp32"]["over_baseline"]["median"] == 2.5
    assert "over_baseline" not in found["a fp32"]
    assert "over_baseline" not in found["b int8"]


# ---- what is given ----


@pytest.fixture
def peers(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = str(repository / "tools/bench/peers")
    spec = spec_from_loader("bench_peers", SourceFileLoader("bench_peers", file))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_peers", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "give the model"),
        (("--gguf", "m", "--only", "wdmoe", "--baseline", "llama.cpp"), "--baseline llama.cpp takes no part"),
        (("--gguf", "m", "--threads", "0"), "from 1 to 1024, got '0'"),
        (("--gguf", "m", "--tokens", "1"), "from 2 to 8192"),
        (("--gguf", "m", "--rounds", "many"), "got 'many'"),
        (("--gguf", "m", "--only", "vllm"), "vllm"),
        (("--gguf", "m", "--timeout", "nan"), "--timeout must be above 0"),
        (("--gguf", "m", "--settle", "-1"), "--settle at least 0"),
        (("--gguf", "m", "--port", "65533"), "leaves no room for 4 servers"),
        (("--gguf", "m", "--gguf-int8", "n", "--port", "65530"), "leaves no room for 8 servers"),
        (("--gguf", "m", "--json", "nowhere/at/all.json"), "there is no folder"),
    ],
)
def test_arguments_that_do_not_fit(
    peers: ModuleType, words: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        peers.arguments(["bin", *words])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_arguments_have_defaults(peers: ModuleType) -> None:
    options = peers.arguments(["bin", "--gguf", "m", "--only", "wdmoe", "llama.cpp-rpc"])
    assert options.only == ["llama.cpp-rpc", "wdmoe"]
    assert options.baseline == "llama.cpp-rpc"
    assert (options.clients, options.max_active, options.rounds) == ([1, 8, 32], 32, 5)
    assert peers.arguments(["bin", "--gguf", "m", "--clients"]).clients == []


def test_a_folder_must_hold_the_programs(folder: Path, tmp_path: Path) -> None:
    assert find_programs(folder).server.name == "ggml-rpc-server"
    (folder / "ggml-rpc-server").rename(folder / "rpc-server")
    (folder / "llama-batched-bench").unlink()
    assert find_programs(folder).server.name == "rpc-server"
    assert find_programs(folder).batched is None
    (folder / "rpc-server").chmod(0o644)
    with pytest.raises(PeerError, match="GGML_RPC=ON"):
        find_programs(folder)
    (folder / "llama-bench").unlink()
    with pytest.raises(PeerError, match="no program llama-bench"):
        find_programs(folder)
    with pytest.raises(PeerError, match="is not a folder"):
        find_programs(tmp_path / "nowhere")


def test_a_model_must_be_the_right_one(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    with pytest.raises(PeerError, match=r"No such file.*Against llama\.cpp"):
        open_gguf(file)
    file.write_bytes(b"PK\3\4")
    with pytest.raises(PeerError, match="is no GGUF file"):
        open_gguf(file)
    file.write_bytes(b"GGUF\3\0\0")
    with pytest.raises(PeerError, match="damaged"):
        open_gguf(file)
    write_gguf(file, {"blk.0.ffn_up.weight": np.ones((2, 2))})
    with pytest.raises(PeerError, match="holds no experts"):
        blocks_of(open_gguf(file), file, "fp32")
    write_gguf(file, {"blk.0.ffn_up_exps.weight": np.ones((2, 2)), "blk.11.ffn_up_exps.weight": np.ones((2, 2))})
    assert blocks_of(open_gguf(file), file, "fp32") == 12
    with pytest.raises(PeerError, match="holds experts in F32; for int8 they must be in Q8_0"):
        blocks_of(open_gguf(file), file, "int8")


@pytest.mark.slow
def test_the_model_must_be_the_same(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    from tests.lab.families import save_tiny
    from wdmoe.backbone.export.export import ExportSettings, export_bundle
    from wdmoe.backbone.format.bundle import Bundle

    export_bundle(save_tiny("granitemoeshared", tmp_path / "model"), tmp_path / "bundle", ExportSettings())
    ours: dict[str, Any] = {}
    for part in Bundle.open(tmp_path / "bundle").station_weights():
        ours |= load_file(part)
    kinds = {"ffn_gate_inp": "block_sparse_moe.router", "attn_norm": "input_layernorm"}
    kinds["ffn_norm"] = "post_attention_layernorm"
    theirs = {
        f"blk.{n}.{short}.weight": ours[f"model.layers.{n}.{long}.weight"]
        for n in range(3)
        for short, long in kinds.items()
    }
    theirs["output_norm.weight"] = ours["model.norm.weight"]
    file = tmp_path / "m.gguf"
    write_gguf(file, theirs)
    check_same(open_gguf(file), file, tmp_path / "bundle")
    router = theirs["blk.2.ffn_gate_inp.weight"]
    for other in (router + 1e-3, router[:-1]):
        write_gguf(file, {**theirs, "blk.2.ffn_gate_inp.weight": other})
        with pytest.raises(PeerError, match=r"another model: its tensor blk\.2\.ffn_gate_inp\.weight"):
            check_same(open_gguf(file), file, tmp_path / "bundle")


# ---- the whole tool, with programs that only look like llama.cpp's ----


def test_a_run(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = ran(folder, "--clients", "1", "8", "--many-tokens", "32", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["versions"]["llama.cpp"] == "1 (0c1e57098)"
    assert found["versions"]["onnxruntime"]
    assert found["versions"]["wdmoe_commit"]
    assert len(found["machine"]["load_at_start"]) == 3
    assert found["notes"] == []
    assert list(found["figures"]) == ["one client", "1 at once", "8 at once"]
    assert found["figures"]["8 at once"]["llama.cpp-rpc fp32"]["tokens_per_s"] == {
        "median": 32.0,
        "p5": 32.0,
        "p95": 32.0,
        "n": 2,
    }
    assert found["figures"]["one client"]["llama.cpp-rpc fp32"]["over_baseline"]["median"] == 1.0
    assert str(tmp_path) not in out.read_text()
    assert "12.500 tokens/s" in done.stdout
    assert len(asked(folder, "llama-bench")) == 4
    with_servers = [line for line in asked(folder, "llama-bench") if "--rpc" in line]
    assert len(with_servers) == 2
    assert with_servers[0].count("RPC0[127.0.0.1:") == 4
    assert len([line for line in asked(folder, "llama-batched-bench") if "-npl 1,8" in line]) == 4


def test_threads_are_tried(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    slow = BENCH.replace("cat <<", "case \"$*\" in *'-t 1 '*) rate=20;; *) rate=10;; esac\nsed s/12.5/$rate/ <<", 1)
    program(folder / "llama-bench", slow)
    done = ran(folder, "--threads", "2", "1", "--clients", "--only", "llama.cpp", "--rounds", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["tried_threads"] == {"llama.cpp fp32": {"1": 20.0, "2": 10.0}}
    assert found["threads"] == {"llama.cpp fp32": 1}


def test_without_a_program_for_many_clients(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    (folder / "llama-batched-bench").unlink()
    done = ran(folder, "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "Note: the folder holds no llama-batched-bench" in done.stdout
    assert list(json.loads(out.read_text())["figures"]) == ["one client"]


def test_a_program_that_fails(folder: Path) -> None:
    program(folder / "llama-bench", "#!/bin/sh\necho loading >&2\necho 'error: failed to load model' >&2\nexit 3\n")
    assert complaint(folder) == "peers: llama-bench ended with code 3: error: failed to load model"


def test_a_program_that_says_something_else(folder: Path) -> None:
    program(folder / "llama-bench", "#!/bin/sh\necho done\n")
    assert complaint(folder) == "peers: llama-bench did not print the JSON of one test: done"


def test_a_program_that_cannot_be_started(folder: Path) -> None:
    program(folder / "llama-bench", "\x7fELF of another machine")
    assert "cannot start" in complaint(folder)


def test_a_program_that_hangs(folder: Path) -> None:
    program(folder / "llama-bench", HANG)
    assert "llama-bench did not end within 3 s" in complaint(folder, "--timeout", "3")
    assert_gone(folder)


def test_a_server_that_does_not_come_up(folder: Path) -> None:
    program(folder / "ggml-rpc-server", "#!/bin/sh\necho 'Failed to find RPC backend' >&2\nexit 1\n")
    told = complaint(folder)
    assert re.search(r"the RPC server at 127\.0\.0\.1:\d+ ended with code 1 \(Failed to find RPC backend\)", told)


def test_a_server_that_does_not_listen(folder: Path) -> None:
    program(folder / "ggml-rpc-server", "#!/bin/sh\nexec sleep 1000\n")
    assert "did not listen within 1 s" in complaint(folder, "--timeout", "1")


def test_a_server_that_dies(folder: Path) -> None:
    """It is named, although llama-bench, which waits for it, says nothing."""
    program(folder / "ggml-rpc-server", SERVER.replace("MORTAL", "True"))
    program(folder / "llama-bench", HANG)
    told = complaint(folder, "--only", "llama.cpp-rpc")
    assert re.search(r"the RPC server at 127\.0\.0\.1:\d+ ended with code 1 \(out of memory\)", told)
    if (folder / "llama-bench.pids").exists():  # a slow machine: it died before
        assert_gone(folder)


def test_a_port_that_is_taken(folder: Path) -> None:
    first = free_ports(4)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 2))
        taken.listen()
        assert f"port {first + 2} is taken" in complaint(folder, "--port", str(first))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_of_it_ends_when_it_is_stopped(folder: Path, number: signal.Signals) -> None:
    program(folder / "llama-bench", HANG)
    with started(command(folder, "--only", "llama.cpp-rpc")) as process:
        wait_for(folder / "llama-bench.pids")
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 4 + 2
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1] == "peers: stopped"
    assert "Traceback" not in err
    wait_until_gone([each.pid for each in below])


@contextmanager
def started(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(file: Path) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not file.exists() or not file.read_text().strip():
        assert time.monotonic() < limit, f"no {file.name}"
        time.sleep(0.05)


def assert_gone(folder: Path) -> None:
    """The program that hung, and what it had started."""
    pids = [int(each) for each in (folder / "llama-bench.pids").read_text().split()]
    assert len(pids) == 2
    wait_until_gone(pids)


def wait_until_gone(pids: Sequence[int]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while any(running(pid) for pid in pids):  # init reaps them when it gets to it
        assert time.monotonic() < limit
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_wdmoe_takes_part(folder: Path, tmp_path: Path) -> None:
    """With the real default model; llama.cpp's programs are still those that only look like it."""
    from safetensors.numpy import load_file

    from wdmoe.backbone.default.bundle import default_bundle
    from wdmoe.backbone.format.bundle import Bundle

    ours: dict[str, Any] = {}
    for part in Bundle.open(default_bundle()).station_weights():
        ours |= load_file(part)
    kinds = {"ffn_gate_inp": "block_sparse_moe.router", "attn_norm": "input_layernorm"}
    kinds["ffn_norm"] = "post_attention_layernorm"
    theirs = {f"blk.{n}.{a}.weight": ours[f"model.layers.{n}.{b}.weight"] for n in range(30) for a, b in kinds.items()}
    theirs |= {f"blk.{n}.ffn_up_exps.weight": np.ones((2, 2)) for n in range(30)}
    write_gguf(tmp_path / "model.gguf", {**theirs, "output_norm.weight": ours["model.norm.weight"]})
    out = tmp_path / "figures.json"
    few = ("--tokens", "4", "--many-tokens", "2", "--clients", "1", "8", "--rounds", "1", "--servers", "2")
    done = ran(folder, "--only", "llama.cpp", "wdmoe", *few, "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["notes"] == []
    for part in ("one client", "1 at once", "8 at once"):
        assert found["figures"][part]["wdmoe fp32"]["tokens_per_s"]["median"] > 0
        assert found["figures"][part]["wdmoe fp32"]["over_baseline"]["n"] == 1
