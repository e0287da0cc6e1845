"""Frames and bytes from people who wish us ill: refused, counted, and the others go on being served."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from tests.lab.wire_examples import a_result, a_run, every_kind
from tests.lab.zmq_lab import WAIT_S, Lab, ask, hear, lab, until
from tests.transport.test_zmq_traps import FAST, port_of, raw_dealer
from wdmoe.errors import ProtocolError, RefusedError
from wdmoe.transport.codec.framing import MAX_TENSORS, join, split, unpack
from wdmoe.transport.codec.messages import PROTOCOL_VERSION, Attach, Attached, Failure, Run
from wdmoe.transport.codec.schema import BY_NUMBER
from wdmoe.transport.codec.wire import MAX_HEADER_BYTES, Limits, decode, encode
from wdmoe.transport.security.keys import new_key_pair
from wdmoe.transport.zmq.channels import ZmqDataLink, ZmqDataStation
from wdmoe.transport.zmq.sockets import LinkSecurity

__all__ = ["lab"]
CASES_PER_KIND = 3000  # of each of the five ways to be odd: 15,000 frames altogether
LIMITS = Limits(max_message_bytes=1 << 20)
ODD_VALUES = (
    None, True, -1, 0, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, float("nan"), float("inf"), -0.0, "", "x" * 3000,
    "\n", "\x00", "é", [], [[]], [1] * 1000, {}, {"a": {}}, ["f32", 1, 1], ["f32", 2**31 - 1, 2**31 - 1],
    ["f32", -1, -1], ["f32", 0, 0], ["f32", 2**64 - 1], ["f64", 1], ["i32", True], ["u8", 10**9], [["f32"], 1],
)  # fmt: skip


def survives(parts: list[bytes]) -> bool:
    """Whether `decode` takes it, framed or not. Any failure but ProtocolError fails the test."""
    taken = _survives(lambda: decode(parts, LIMITS))
    if parts and len(parts[0]) >= 2 and len(parts) <= 1 + MAX_TENSORS:
        assert arrives(join(parts)) == taken
    return taken


def arrives(frame: bytes | bytearray) -> bool:
    taken = _survives(lambda: decode(split(memoryview(frame)), LIMITS))
    assert _survives(lambda: unpack(memoryview(frame), LIMITS)) == taken, "the native way judges alike"
    return taken


def _survives(read: Callable[[], object]) -> bool:
    try:
        read()
    except ProtocolError as error:
        text = str(error)
        assert "\n" not in text
        assert text.isprintable()
        assert len(text) < 400
        return False
    return True


def correct(rng: np.random.Generator) -> list[bytes]:
    kinds = every_kind()
    return [bytes(frame) for frame in encode(kinds[int(rng.integers(len(kinds)))], bool(rng.integers(2)))]


def test_random_bytes(rng: np.random.Generator) -> None:
    taken = 0
    for _ in range(CASES_PER_KIND):
        frames = [rng.bytes(int(rng.integers(0, 200))) for _ in range(int(rng.integers(0, 6)))]
        if frames and rng.integers(4):
            number = int(rng.choice(list(BY_NUMBER))) if rng.integers(2) else int(rng.integers(256))
            frames[0] = bytes([PROTOCOL_VERSION, number]) + frames[0]
        taken += survives(frames)
    assert taken == 0


def test_truncated_and_extended_messages(rng: np.random.Generator) -> None:
    for _ in range(CASES_PER_KIND):
        frames = correct(rng)
        which = int(rng.integers(len(frames)))
        match int(rng.integers(5)):
            case 0:
                frames[which] = frames[which][: int(rng.integers(len(frames[which]) + 1))]
            case 1:
                frames[which] += rng.bytes(int(rng.integers(1, 50)))
            case 2:
                del frames[which:]
            case 3:
                frames.insert(which, rng.bytes(int(rng.integers(50))))
            case 4:
                frames += [b""] * int(rng.integers(1, 100))
        survives(frames)


def test_flipped_bits(rng: np.random.Generator) -> None:
    for _ in range(CASES_PER_KIND):
        frames = [bytearray(frame) for frame in correct(rng)]
        for _ in range(int(rng.integers(1, 4))):
            frame = frames[int(rng.integers(len(frames)))]
            if frame:
                frame[int(rng.integers(len(frame)))] ^= 1 << int(rng.integers(8))
        survives([bytes(frame) for frame in frames])
        whole = bytearray(join(correct(rng)))
        for _ in range(int(rng.integers(1, 4))):
            whole[int(rng.integers(min(len(whole), 24)))] ^= 1 << int(rng.integers(8))
        arrives(whole)
        arrives(whole[: int(rng.integers(len(whole)))])
        arrives(whole + b"x")


def test_odd_field_values(rng: np.random.Generator) -> None:
    for _ in range(CASES_PER_KIND):
        frames = correct(rng)
        header = msgpack.unpackb(frames[0][2:])
        header.pop("crc32", None)
        name = str(rng.choice(list(header)))
        odd = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
        match int(rng.integers(4)):
            case 0:
                header[name] = odd
            case 1:
                del header[name]
            case 2:
                header[str(rng.choice(["x", "report", "crc32", "tokens", ""]))] = odd
            case 3 if isinstance(header[name], list) and header[name]:
                header[name][int(rng.integers(len(header[name])))] = odd
        survives([frames[0][:2] + msgpack.packb(header), *frames[1:]])


def test_lying_headers(rng: np.random.Generator) -> None:
    """Lengths that are not there, deep nesting, and structure that unpacks to far more than it is."""
    lies = [
        *(b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"),
        *(b"\xc9\xff\xff\xff\xff\x00", b"\xde\xff\xff", b"\x91" * 4000, b"\x81\xa0" * 2000),
        b"\xdc\x04\x00" + b"\x80" * 1024,
    ]
    for _ in range(CASES_PER_KIND):
        lie = lies[int(rng.integers(len(lies)))]
        field = b"\x81" + msgpack.packb(str(rng.choice(["session", "report", "tokens", "experts"])))
        body = (field if rng.integers(2) else b"") + lie + rng.bytes(int(rng.integers(20)))
        start = bytes([PROTOCOL_VERSION, int(rng.choice(list(BY_NUMBER)))])
        assert not survives([start + body, *[bytes(8)] * int(rng.integers(4))])
    assert not survives([b"\x02\x12" + b"\x80" * (1 << 20)])
    assert not survives([b"\x02\x12" + b"\x80" * (MAX_HEADER_BYTES - 2)])
    assert not survives([b"\x02\x05\x80", bytes(2 << 20)])


@contextmanager
def legitimate_work(station: ZmqDataStation, link: ZmqDataLink) -> Iterator[list[int]]:
    """A device that computes and a station that asks it, all the while. Yields the numbers of finished runs."""
    route = ask(link, station).route
    stop, done, errors = threading.Event(), [], []

    def device() -> None:
        try:
            while not stop.is_set():
                if (envelope := link.receive(0.05)) is not None and isinstance(envelope.message, Run):
                    link.send(a_result(envelope.message))
        except Exception as error:
            errors.append(error)

    def base_station() -> None:
        try:
            attempt = 0
            while not stop.is_set():
                attempt += 1
                station.send(route, a_run(attempt=attempt, hidden=256))
                limit = time.monotonic() + WAIT_S
                # The hostile ones may say what is formally right: an answer counts from its own device only.
                while (envelope := station.receive(0.1)) is None or envelope.route != route:
                    if stop.is_set():
                        return
                    assert time.monotonic() < limit, "no answer from the legitimate device"
                done.append(attempt)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for work in (device, base_station)]
    for thread in threads:
        thread.start()
    try:
        yield done
        finished = len(done)
        until(lambda: errors or len(done) > finished + 10, "the legitimate device to go on")
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert not errors


def test_a_station_under_attack_goes_on_serving(lab: Lab, rng: np.random.Generator) -> None:
    station = lab.station()
    insider = lab.admitted("insider")
    with legitimate_work(station, lab.link(station.endpoint)) as done:
        attack_with_bytes(port_of(station), rng)
        attack_as_outsider(lab, station.endpoint)
        attack_as_insider(lab, insider, station.endpoint, rng)
        until(lambda: len(done) > 100, "a hundred answers")
    assert station.counters["invalid_message"] > 100
    assert lab.door.counters["unknown_key"] >= 1


def attack_with_bytes(port: int, rng: np.random.Generator) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(48)
    for start in (b"", greeting[:10], greeting, greeting + b"\x04\x19\x05HELLO" + bytes(300)):
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as client, suppress(OSError):
            client.sendall(start + rng.bytes(5000))


def attack_as_outsider(lab: Lab, endpoint: str) -> None:
    """Plain text, no key, a stranger's key, the wrong server key: none gets a frame in, ours are told so."""
    frame = join(encode(Attach(session=1)))
    for security in (
        None,
        LinkSecurity(lab.keys.public, new_key_pair()),
        LinkSecurity(new_key_pair().public, lab.admitted("right").keys),
    ):
        with raw_dealer(lab, security, endpoint) as dealer:
            with suppress(zmq.Again):
                dealer.send(frame, zmq.NOBLOCK)
            assert dealer.poll(300) == 0
    with pytest.raises(RefusedError):
        lab.link(endpoint, LinkSecurity(lab.keys.public, new_key_pair())).receive(WAIT_S)


def attack_as_insider(lab: Lab, security: LinkSecurity, endpoint: str, rng: np.random.Generator) -> None:
    """An admitted device may say anything; nonsense is counted, one line a second is logged."""
    with raw_dealer(lab, security, endpoint) as dealer:
        for _ in range(300):
            frames = [rng.bytes(int(rng.integers(1, 300))) for _ in range(int(rng.integers(1, 5)))]
            dealer.send_multipart([b"\x02" + frames[0], *frames[1:]])
        dealer.send_multipart([b"x"] * 1000)
        replayed = join(encode(a_result(a_run(attempt=1))))
        for _ in range(100):
            dealer.send(replayed)
    with raw_dealer(lab, security, endpoint) as dealer:
        dealer.send(bytes(20 << 20))  # above MAXMSGSIZE: cut off


def test_replayed_ciphertext_is_worthless(lab: Lab) -> None:
    """What an outsider recorded from one connection opens no other: CURVE's keys and counters are per connection."""
    station = lab.station(options=FAST)
    record: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def forward(source: socket.socket, sink: socket.socket, keep: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                if keep:
                    record.append(piece)
                sink.sendall(piece)

    link = lab.link(f"tcp://127.0.0.1:{listener.getsockname()[1]}", options=FAST)
    near, _ = listener.accept()
    far = socket.create_connection(("127.0.0.1", port_of(station)))
    for ends in ((near, far, True), (far, near, False)):
        threading.Thread(target=forward, args=ends, daemon=True).start()
    ask(link, station, Attach(session=4321))
    for end in (near, far, listener):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
    with socket.create_connection(("127.0.0.1", port_of(station)), timeout=WAIT_S) as again, suppress(OSError):
        again.sendall(b"".join(record))
        while again.recv(1000):
            pass
    while (envelope := station.receive(0.5)) is not None:
        assert envelope.message.session != 4321 or envelope.key  # only what was on its way before
    assert b"".join(record).find(b"session") < 0, "and nothing was readable"


def test_refusals_are_counted_all_and_logged_seldom(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    station = lab.station()
    security = lab.admitted("insider")
    with raw_dealer(lab, security, station.endpoint) as dealer:
        for _ in range(200):
            dealer.send(b"\x02\x02nonsense")
        until(lambda: station.receive(0.1) is None and station.counters["invalid_message"] == 200)
    lines = [record.getMessage() for record in caplog.records if "nonsense" in record.msg or "refused" in record.msg]
    assert 1 <= len(lines) <= 10
    assert security.keys.fingerprint in lines[0]
    assert "127.0.0.1" in lines[0]


def test_another_version_is_told_what_is_spoken_here(lab: Lab) -> None:
    station = lab.station()
    with raw_dealer(lab, lab.admitted(), station.endpoint) as dealer:
        dealer.send_multipart([b"\x07\x01" + os.urandom(30)])
        until(lambda: station.receive(0.1) is None and dealer.poll(0), "the answer")
        answer: Any = decode(split(memoryview(dealer.recv())))
    assert isinstance(answer, Failure)
    assert answer.reason == "protocol version 7 not spoken here; this side speaks 2"
    assert station.counters == {"wrong_version": 1}


def test_a_link_skips_nonsense_from_its_station_and_never_answers_it(lab: Lab) -> None:
    station = lab.station()
    link = lab.link(station.endpoint)
    asked = ask(link, station)
    raw = station._messages.socket
    raw.send_multipart([asked.route, b"\x02\x12junk"])
    raw.send_multipart([asked.route, b"\x07\x12junk"])
    station.send(asked.route, Attached(session=9))
    assert isinstance(hear(link).message, Attached)
    assert link.counters == {"invalid_message": 1, "wrong_version": 1}
    assert station.receive(0.2) is None
