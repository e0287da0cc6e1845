"""Connections that cost others nothing: each has its time, each address its number, and whoever is silent makes room.

uvicorn bounds neither the time that the head of a request may take nor the connections of one address, and its own
limit turns health checks away too. This is its protocol class with those bounds added.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from typing import ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from wdmoe.serving.errors import Problem, too_slow
from wdmoe.serving.requests import ServingLimits

_log = logging.getLogger(__name__)

CROWDED = "crowded"  # in a request's state: on this connection only the server's state is told
_NOISE_S = 10.0  # one line of the log stands for all that is closed in this time


class Crowd:
    """All connections of one server. The oldest silent one goes first when there are too many."""

    def __init__(self, limits: ServingLimits) -> None:
        self.limits = limits
        self._members: dict[GuardedConnection, str] = {}  # with their addresses, in the order in which they came
        self._by_address: Counter[str] = Counter()
        self._told_s = float("-inf")

    def join(self, member: GuardedConnection, address: str) -> bool:
        """Take a connection in. A silent one is closed for it where there are too many.

        Returns:
            Whether it may ask for more than the server's state: no, if there are too many and all are busy.
        """
        self._members[member] = address
        self._by_address[address] += 1
        if self._by_address[address] > self.limits.connections_per_address and self._drop_silent(address, member):
            return True
        if len(self._members) <= self.limits.connections:
            return True
        return any(self._drop_silent(each, member) for each, _ in self._by_address.most_common())

    def leave(self, member: GuardedConnection) -> None:
        """A connection is closed, or about to be."""
        address = self._members.pop(member, None)
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def _drop_silent(self, address: str, but: GuardedConnection) -> bool:
        mates = (each for each, its in self._members.items() if its == address and each is not but)
        oldest = next((each for each in mates if each.silent), None)
        if oldest is None:
            return False
        self._tell(address)
        oldest.drop()
        return True

    def _tell(self, address: str) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._told_s > _NOISE_S:
            self._told_s = now_s
            count, own = len(self._members), self._by_address[address]
            _log.warning("%d HTTP connections, %d of them from %s: silent ones are closed", count, own, address)


class GuardedConnection(H11Protocol):
    """One connection, with bounds on its time."""

    crowd: ClassVar[Crowd]  # set by `guarded`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """uvicorn's, and a place in the crowd."""
        super().connection_made(transport)
        self._slow: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._spoke = False  # since the last answer
        self._start_head()
        if not self.crowd.join(self, self.client[0] if self.client else ""):
            self.app_state = {**self.app_state, CROWDED: True}

    def connection_lost(self, exc: Exception | None) -> None:
        """uvicorn's, and the place is free."""
        self.crowd.leave(self)
        self._end_head()
        self._end_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """uvicorn's, for which any byte ends the time of an idle connection. The time of a head begins instead."""
        self._spoke = True
        super().data_received(data)
        if self._idle and self._slow is None and not self.transport.is_closing():
            self._start_head()

    def handle_events(self) -> None:
        """uvicorn's. If the head is complete now, its time has ended."""
        super().handle_events()
        if not self._idle:
            self._end_head()

    def on_response_complete(self) -> None:
        """uvicorn's, which begins the time of an idle connection."""
        self._spoke = False
        self._end_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """uvicorn's. A client that does not read has its time too."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.crowd.limits.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """uvicorn's: it reads again."""
        self._end_stall()
        super().resume_writing()

    @property
    def silent(self) -> bool:
        """Whether nothing is in work for it: there is no request, or only a part of one."""
        return self._idle or self.cycle.more_body

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def drop(self) -> None:
        """Close at once, and count no more."""
        self.crowd.leave(self)
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """In place of uvicorn's plain text."""
        self._refuse(Problem(400, "the request is not valid HTTP"))

    def _start_head(self) -> None:
        self._slow = self.loop.call_later(self.crowd.limits.head_s, self._too_slow)

    def _end_head(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _end_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _too_slow(self) -> None:
        self._slow = None
        if not self._idle or self.transport.is_closing():
            return
        if self._spoke:
            self._refuse(too_slow("head", self.crowd.limits.head_s))
        else:  # a client that speaks just now must not take this for an answer
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """Answer what is no whole request, and close."""
        body = json.dumps(problem.body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        answer = h11.Response(status_code=problem.status_code, headers=headers, reason=b"")
        try:
            for part in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        except h11.LocalProtocolError:  # an answer is on its way already: it ends here
            _log.debug("not refused: an answer is on its way")
        self.transport.close()


def guarded(limits: ServingLimits) -> type[GuardedConnection]:
    """The protocol class of one server: its connections share a `Crowd`."""
    return cast("type[GuardedConnection]", type("Connection", (GuardedConnection,), {"crowd": Crowd(limits)}))
