"""Where devices find the base station."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import psutil

from wdmoe.errors import ConfigError
from wdmoe.transport.security.keys import write_private_json

MOST_ADDRESSES = 4
LAST_ENDPOINTS = "endpoints.json"  # in the state folder, so that a token made beside a running station fits it


def data_bind(control_endpoint: str, bind: str, data_port: int) -> str:
    """Address of the data plane: the control plane's interface, with a port of its own.

    Args:
        control_endpoint: what the control plane is bound to, port known.
        bind: what was asked for; a port of `*` there means any port here, too.
        data_port: 0: one above the control port.
    """
    host, _, port = control_endpoint.rpartition(":")
    if data_port:
        return f"{host}:{data_port}"
    return f"{host}:*" if bind.endswith((":*", ":0")) else f"{host}:{int(port) + 1}"


def dial_endpoints(control_endpoint: str, advertise: str) -> tuple[str, ...]:
    """Addresses for a join token, best first.

    Raises:
        ConfigError: `advertise` is not a host name or address.
    """
    host, _, port = control_endpoint.removeprefix("tcp://").rpartition(":")
    if advertise:
        if any(c in advertise for c in " /*") or not advertise.isprintable():
            raise ConfigError(f"advertise needs a host name or address such as 192.168.1.2, got {advertise!r}")
        return (f"tcp://{advertise}:{port}",)
    if host not in ("0.0.0.0", "[::]", "*"):  # noqa: S104 - compared, not bound
        return (f"tcp://{host}:{port}",)
    return tuple(f"tcp://{address}:{port}" for address in _own_addresses())


def remember_endpoints(state: Path, endpoints: tuple[str, ...]) -> None:
    """Note where a station is reached.

    Raises:
        ConfigError: the state folder cannot be written.
    """
    try:
        write_private_json(state / LAST_ENDPOINTS, {"endpoints": list(endpoints)})
    except OSError as error:
        raise ConfigError(f"state folder {state}: {error.strerror or error}") from error


def last_endpoints(state: Path) -> tuple[str, ...]:
    """Where the station of this state folder was reached last; before its first start, where it will be by default.

    Raises:
        ConfigError: the note of it cannot be read. A guess would make a token that leads nowhere.
    """
    note = state / LAST_ENDPOINTS
    try:
        found = json.loads(note.read_text(encoding="utf-8"))["endpoints"]
    except FileNotFoundError:
        return dial_endpoints("tcp://*:5555", "")
    except OSError as error:
        raise ConfigError(f"{note} cannot be read ({error.strerror or error}): state the address") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        found = None
    if not (isinstance(found, list) and found and all(isinstance(each, str) for each in found)):
        raise ConfigError(f"{note} is damaged: state the address, as in tcp://192.168.1.2:5555, or delete the file")
    return tuple(found)


def _own_addresses() -> list[str]:
    """IPv4 addresses that other machines may reach, and the loopback one where there is no other."""
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith(("127.", "169.254."))
    ]
    return found[:MOST_ADDRESSES] or ["127.0.0.1"]
