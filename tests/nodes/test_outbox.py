"""What a station is about to send: bounded for each peer, in order, nothing lost of the others."""

from __future__ import annotations

import asyncio

from tests.lab.wire_examples import same
from wdmoe.nodes.authentication import NoAuthentication
from wdmoe.nodes.outbox import MOST_WAITING, Outbox
from wdmoe.transport.codec.messages import Pong, Welcome
from wdmoe.transport.codec.wire import decode, encode


def test_one_peer_cannot_fill_it() -> None:
    async def scene() -> None:
        outbox = Outbox()
        for sequence in range(10 * MOST_WAITING):
            outbox.put(b"greedy", Pong(sequence=sequence))
        outbox.put(b"modest", Pong(sequence=7))
        assert len(outbox) == MOST_WAITING + 1
        assert outbox.dropped == 9 * MOST_WAITING
        sent = [await outbox.get() for _ in range(len(outbox))]
        assert sent[-1][0] == b"modest"
        assert [message.sequence for _, message in sent[:-1]] == list(range(MOST_WAITING))  # type: ignore[attr-defined]
        outbox.put(b"greedy", Pong(sequence=1))
        assert (await outbox.get())[0] == b"greedy", "there is room again"
        assert not outbox._waiting, "and nobody is remembered"

    asyncio.run(scene())


def test_without_encryption_a_device_can_be_welcomed() -> None:
    """The name that a session gets there must be one that a Welcome may carry."""
    device_id = NoAuthentication().device_id("session-0000000000000007")
    welcome = Welcome(
        session=7,
        enrolled=False,
        device_id=device_id,
        data_port=1,
        lease_s=1.0,
        max_message_bytes=1,
        model="x",
        manifest_sha256="",
    )
    assert same(decode(encode(welcome)), welcome)
