"""A process that has imported everything an engine needs, and starts engines by fork: each in a fraction of a second.

It computes nothing and runs no thread of Python's, so that a fork is whole. It obeys one socket: "start" begins an
engine, "reap" waits for its end, "warm" imports what the first engine turned out to need. It ends with its parent,
even where that is killed, and its engine ends with it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from wdmoe.nodes.supervised.plain import pack, told, unpacker

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_READ_BYTES = 1 << 16


def end_with(parent: int) -> None:
    """Have the system kill this process when its parent ends; do so at once if that has happened."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


class _Spawner:
    """Obeys the socket to the parent."""

    def __init__(self, orders: socket.socket) -> None:
        self._orders = orders
        self._unpacker = unpacker()
        self._engine = 0

    def obey(self) -> None:
        """Until the parent closes its end."""
        self._tell("ready")
        while True:
            data, files, _, _ = socket.recv_fds(self._orders, _READ_BYTES, 1)
            if not data:
                return
            self._unpacker.feed(data)
            for order, *words in self._unpacker:
                self._do(order, words, files)

    def _do(self, order: str, words: list[Any], files: list[int]) -> None:
        if order == "start":
            self._tell("started", self._start(files[0], words))
        elif order == "reap":
            self._tell("ended", self.reap())
        elif order == "warm":
            _import_all(words[0])

    def _start(self, link: int, words: list[Any]) -> int:
        gc.collect()
        gc.freeze()  # what is there now stays shared between the processes
        parent = os.getpid()
        self._engine = os.fork()
        if not self._engine:
            end_with(parent)
            self._orders.close()
            _become_engine(link, *words)
        os.close(link)
        return self._engine

    def reap(self) -> int:
        """Whatever is left of the engine ends now. The exit code; the negative number of a signal."""
        if not self._engine:
            return 0
        os.kill(self._engine, signal.SIGKILL)  # of a process that ended already nothing comes of it
        _, status = os.waitpid(self._engine, 0)
        self._engine = 0
        return os.waitstatus_to_exitcode(status)

    def _tell(self, *message: object) -> None:
        self._orders.sendall(pack(message))


def _become_engine(link: int, *words: Any) -> NoReturn:
    from wdmoe.nodes.supervised.engine_process import run_engine

    code = 1
    try:
        run_engine(socket.socket(fileno=link), *words)
        code = 0
    except BaseException:
        _log.exception("the engine process failed")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)  # tearing torch down takes a second and is of no use


def _import_all(names: Iterable[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # some are no files of their own, some do not like to be alone: they come when needed
            _log.debug("not imported ahead: %s", name, exc_info=True)


def main() -> None:
    """`python -m wdmoe.nodes.supervised.spawner PARENT FILE`: FILE is the number of the inherited socket."""
    parent, file = int(sys.argv[1]), int(sys.argv[2])
    # The parent ends the engine in order; a signal to the whole group of processes is not for this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)
    orders = socket.socket(fileno=file)
    try:
        importlib.import_module("wdmoe.nodes.supervised.engine_process")
    except Exception as error:
        orders.sendall(pack(("failed", *told(error))))
        raise
    spawner, code = _Spawner(orders), 1
    try:
        spawner.obey()
        code = 0
    except BaseException:
        _log.exception("the process that starts engines failed")
    finally:
        spawner.reap()
        logging.shutdown()
        os._exit(code)  # as the engine: tearing down what was imported takes a second and is of no use


if __name__ == "__main__":
    main()
