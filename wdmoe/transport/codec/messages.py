"""Every message that travels between a base station (BS) and its devices. The codec is `wdmoe.transport.codec.wire`.

Two planes, so that a bulk download of experts never stands in the way of a token:

- control: Hello, Welcome, Place, Fetch, Chunk, Ready, Ping, Pong, Goodbye (asyncio on both ends);
- data: Attach, Attached, Run, Result, Failure (blocking sockets, one thread on both ends).

A semantic broadcast (`wdmoe.nodes.broadcast`) has Tune, Tuned, Rows and Shown on the control plane, and a plane of its
own where the base station alone speaks: Pilot, Symbols.

Arrays are C-contiguous little-endian and travel raw, behind the header.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy.typing as npt

from wdmoe.arrays import Float32Array, Int32Array, Int64Array, UInt8Array
from wdmoe.records import DeviceReport

PROTOCOL_VERSION = 2

Activations: TypeAlias = npt.NDArray[Any]  # float32 or float16, (tokens, hidden)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hello:
    """Device to BS, repeated until Welcome arrives (idempotent). `session` is fresh for every start of a device.

    Sent once more in a live session when the report has changed.
    """

    session: int  # uint64, random
    report: DeviceReport
    enrol_key: str = ""  # Z85 public key to admit; only on a connection made with a join token's key


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Welcome:
    """BS to device. `enrolled`: the key is admitted now; reconnect with it. Otherwise the session is live."""

    session: int
    enrolled: bool = False
    device_id: str = ""  # fingerprint of the device's key
    data_port: int = 0  # 0: there is no work for experts here, only a broadcast
    lease_s: float = 3.0  # silence after which either side gives the other up
    max_message_bytes: int = 0
    model: str = ""  # for people
    manifest_sha256: str = ""  # of the bundle that is served; experts cached under another are not mixed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """BS to device: hold exactly these experts. Sent after Welcome and whenever the placement changes."""

    generation: int  # counts placements; a lower one than the last seen is stale
    experts: Int32Array  # (experts, 2): layer, expert
    sha256: UInt8Array  # (experts, 32)
    size: Int64Array  # (experts,) bytes of the ONNX file
    hidden: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fetch:
    """Device to BS: send me this part of an expert's file."""

    layer: int
    expert: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """BS to device: the part asked for."""

    layer: int
    expert: int
    offset: int
    total: int
    data: UInt8Array  # (bytes,)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ready:
    """Device to BS: these experts are loaded and can be run. Sent as loading proceeds; always the full set."""

    generation: int
    experts: Int32Array  # (experts, 2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ping:
    """Device to BS, several per lease. `done` counts finished runs: a heartbeat proves progress, not just a thread."""

    sequence: int
    done: int
    queued: int
    rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pong:
    """BS to device."""

    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Goodbye:
    """Either way: this side ends the session. `retry` says whether coming back soon makes sense."""

    reason: str
    retry: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attach:
    """Device to BS on the data plane, repeated until Attached: binds this connection to a live session."""

    session: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attached:
    """BS to device on the data plane."""

    session: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """BS to device: one MoE layer's work for it, all tokens and experts in one message.

    Expert `experts[i]` serves `counts[i]` tokens; `rows` and `weights` hold those, expert after expert. The device
    answers with the weighted partial sum over its experts, so one vector per token comes back, however many of
    its experts the token uses.
    """

    attempt: int  # uint64, never reused: replies to older attempts are recognised as late
    layer: int
    remaining_s: float  # the device drops work that nobody waits for any more
    experts: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: Activations  # (tokens, hidden)
    rows: Int32Array  # (sum(counts),) into tokens
    weights: Float32Array  # (sum(counts),) gate weights
    bandwidth_hz: float = 0.0  # the device's part of the band for this order and its answer; 0: no band is shared


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """Device to BS: `partial[t] = sum_e weight[e, t] * expert_e(tokens[t])`, dtype as in the request."""

    attempt: int
    layer: int
    compute_s: float  # expert arithmetic only
    residence_s: float  # from the message's arrival to the reply's departure, emulated link time excluded
    link_down_s: float  # emulated link time, 0 without emulation
    link_up_s: float
    partial: Activations  # (tokens, hidden)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Failure:
    """Either way: a request was understood and refused. `attempt` is 0 where it answers no Run and no Tune."""

    attempt: int  # of a Run, or the number of a broadcast
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tune:
    """BS to device: hear this broadcast as one of its two users. Repeated until Tuned; a newer one ends an older."""

    broadcast: int  # uint64, random
    port: int  # of the broadcast plane, on the host of the control plane
    user: int  # 0 or 1
    blocks: int  # of symbols, altogether
    shared: int  # the first so many carry both pictures, the rest the one that has more tiles
    uses: int  # complex channel uses of a block
    height: int  # of this user's picture, pixels
    width: int
    share: float  # of this user in a shared block: alpha, or 1 - alpha
    snr_db: float  # of the channel to be emulated
    fades: bool  # flat Rayleigh fading of each block, known to the receiver; else the channel is steady
    seed: int  # of that channel, uint64
    decoder_sha256: str  # of the ONNX file; fetched as expert (0, 0)
    decoder_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tuned:
    """Device to BS: the decoder is open, and a Pilot was heard. Repeated with every Pilot that has nothing sent."""

    broadcast: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Device to BS: some rows of its picture as it was shown. They come in order, each once."""

    broadcast: int
    first: int
    pixels: UInt8Array  # (rows, width, 3)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shown:
    """Device to BS: all rows were sent; this is what they came from."""

    broadcast: int
    heard: int  # blocks that this user's picture needed, and those of them that never came
    lost: int
    decode_s: float  # in the decoder


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pilot:
    """BS to everybody on the broadcast plane, all the time: what has been sent so far, so that a gap is seen."""

    broadcast: int
    sent: int  # blocks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Symbols:
    """BS to everybody on the broadcast plane, once: some blocks of the waveform."""

    broadcast: int
    first: int  # number of the first block
    symbols: Activations  # (blocks, uses, 2) float32 or float16: real and imaginary part; mean power 1 in a block


Message: TypeAlias = (
    Hello
    | Welcome
    | Place
    | Fetch
    | Chunk
    | Ready
    | Ping
    | Pong
    | Goodbye
    | Tune
    | Tuned
    | Rows
    | Shown
    | Attach
    | Attached
    | Run
    | Result
    | Failure
    | Pilot
    | Symbols
)
