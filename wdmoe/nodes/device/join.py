"""How a device comes in: where to dial, with which key, and Hello until Welcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from wdmoe.config import DeviceSettings
from wdmoe.errors import ConfigError, ProtocolError, TransportError
from wdmoe.nodes.device.session import SentAwayError
from wdmoe.tasks import within
from wdmoe.transport.channel import ControlLink, DataLink
from wdmoe.transport.codec.messages import Failure, Goodbye, Hello, Message, Welcome
from wdmoe.transport.security.join_tokens import parse_token
from wdmoe.transport.security.keys import KeyPair, device_keys
from wdmoe.transport.zmq.channels import open_control_link, open_data_link
from wdmoe.transport.zmq.pubsub import Tuner, open_tuner
from wdmoe.transport.zmq.sockets import Context, LinkSecurity, new_context

HELLO_AGAIN_S = 0.5
CONNECTING_S = 0.02  # before a Hello that could not even be sent is tried again
HELLO_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """This device's own pair, the base station's key, and the pair that gets the own one admitted."""

    keys: KeyPair
    server_key: str
    enrolment: KeyPair
    fresh: bool  # made just now, so nobody has admitted it yet


class Dialer:
    """Opens links to one base station. Without an identity nothing is encrypted."""

    def __init__(self, context: Context, endpoints: tuple[str, ...], identity: Identity | None) -> None:
        """Owns `context`; the links it opens are the callers' to close, before `close`."""
        self._context = context
        self._endpoints = endpoints
        self._identity = identity
        self.endpoint = endpoints[0]

    @property
    def must_enrol(self) -> bool:
        """The own key can't be known to the base station yet."""
        return self._identity is not None and self._identity.fresh

    @property
    def can_enrol(self) -> bool:
        """There is a key to enrol with."""
        return self._identity is not None

    @property
    def public_key(self) -> str:
        """The own key, "" without one."""
        return "" if self._identity is None else self._identity.keys.public

    def turn_to(self, attempt: int) -> None:
        """Use another of the base station's endpoints for every attempt."""
        self.endpoint = self._endpoints[attempt % len(self._endpoints)]

    def control(self) -> ControlLink:
        """The control plane, with the own key."""
        return open_control_link(self._context, self.endpoint, self._security())

    def enrolment(self) -> ControlLink:
        """The control plane, with the token's key."""
        security = None
        if self._identity is not None:
            security = LinkSecurity(self._identity.server_key, self._identity.enrolment)
        return open_control_link(self._context, self.endpoint, security)

    def data_opener(self, port: int) -> Callable[[], DataLink]:
        """What opens the data plane (same host, Welcome's port) on the thread that will own it."""
        endpoint = f"{self.endpoint.rpartition(':')[0]}:{port}"
        return lambda: open_data_link(self._context, endpoint, self._security())

    def tuner(self, port: int) -> Tuner:
        """The broadcast plane, on the same host, for the running event loop."""
        return open_tuner(self._context, f"{self.endpoint.rpartition(':')[0]}:{port}", self._security())

    def close(self) -> None:
        """Call after all links are closed."""
        self._context.destroy(linger=0)

    def _security(self) -> LinkSecurity | None:
        return None if self._identity is None else LinkSecurity(self._identity.server_key, self._identity.keys)


def open_dialer(settings: DeviceSettings) -> Dialer:
    """Read what the user gave after `--join`, and this device's key, which is made on first use.

    Raises:
        ConfigError: it is neither a token nor, when insecure, an endpoint; or the key file can't be used.
    """
    if settings.insecure:
        if not settings.join.startswith("tcp://"):
            raise ConfigError(f"--insecure joins an endpoint like tcp://192.168.1.2:5555, not {settings.join[:40]!r}")
        return Dialer(new_context(), (settings.join,), None)
    token = parse_token(settings.join)
    fresh = not (settings.state / "device.key").exists()
    identity = Identity(
        keys=device_keys(settings.state),
        server_key=token.server_key,
        enrolment=token.enrolment,
        fresh=fresh,
    )
    return Dialer(new_context(), token.endpoints, identity)


async def introduce(link: ControlLink, hello: Hello) -> Welcome:
    """Say Hello until the base station answers: the first ones cannot be sent while the connection is made.

    Raises:
        SentAwayError: it wants this device not to come back soon.
        RefusedError: it refused the key.
        TransportError: no answer, or not now.
        ProtocolError: a Welcome that makes no sense.
    """
    give_up_s = time.monotonic() + HELLO_PATIENCE_S
    reason = "no answer"
    while (now_s := time.monotonic()) < give_up_s:
        again_s = HELLO_AGAIN_S
        try:
            await link.send(hello)
        except TransportError as error:
            reason, again_s = str(error), CONNECTING_S
        answer = await _answer(link, now_s + again_s)
        if isinstance(answer, Welcome) and answer.session == hello.session:
            return _checked(answer)
        if isinstance(answer, Failure):
            reason = answer.reason
    raise TransportError(f"the base station doesn't welcome this device: {reason}")


async def _answer(link: ControlLink, until_s: float) -> Message | None:
    """The next message that matters while joining, or None."""
    while (left_s := until_s - time.monotonic()) > 0:
        try:
            message = (await within(left_s, link.receive())).message
        except asyncio.TimeoutError:
            return None
        if isinstance(message, Goodbye):
            if not message.retry:
                raise SentAwayError(f"the base station sent this device away: {message.reason}")
            raise TransportError(f"the base station is not ready: {message.reason}")
        if isinstance(message, (Welcome, Failure)):
            return message
    return None


def _checked(welcome: Welcome) -> Welcome:
    if not welcome.enrolled and not welcome.lease_s > 0:
        raise ProtocolError(f"a Welcome with a lease of {welcome.lease_s} s")
    return welcome
