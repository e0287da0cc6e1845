"""`status`: how a running base station is."""

from __future__ import annotations

import http.client
import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import click

from wdmoe.cli.params import SECRET
from wdmoe.cli.tables import print_table, printable
from wdmoe.errors import RefusedError, TransportError
from wdmoe.units import Dimension, format_quantity

_MOST_BYTES = 64 << 20  # of an answer
_TIMEOUT_S = 10.0
_COLUMNS = (
    *("device", "hardware", "provider", "experts", "ready"),
    *("memory", "speed", "per token", "queued", "lies", "link"),
)


@click.command()
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="HTTP address of the base station.")
@click.option(
    "--api-key",
    type=SECRET,
    envvar="WDMOE_API_KEY",
    default="",
    help="API key of the base station, or @FILE that holds it; also from $WDMOE_API_KEY.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole status as JSON.")
@click.option(
    "--print-placement",
    is_flag=True,
    help="Print which device holds which experts, in the form that `bs --placement` reads.",
)
def status(url: str, api_key: str, as_json: bool, print_placement: bool) -> None:
    """Show the devices of a running base station, and how fast they are.

    \b
    Examples:
      wdmoe-node status
      wdmoe-node status --url http://192.0.2.7:8080 --api-key @key.txt --json
      wdmoe-node status --print-placement > placement.json
    """
    state = _get_status(url, api_key)
    if print_placement:
        placement = state.get("placement")
        if not isinstance(placement, str):
            raise TransportError(f"{url} does not say where its experts are")
        click.echo(placement, nl=False)
    elif as_json:
        click.echo(json.dumps(state, indent=2, ensure_ascii=False))
    else:
        _show(state)


def _get_status(url: str, api_key: str) -> Mapping[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise click.BadParameter(f"{url!r} is no address like http://127.0.0.1:8080", param_hint="--url")
    request = urllib.request.Request(f"{url.rstrip('/')}/wdmoe/status")  # noqa: S310 - checked above
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
            state = json.loads(response.read(_MOST_BYTES))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 401:
            raise RefusedError(f"{url} wants its API key: give it with --api-key") from error
        raise TransportError(f"{url} answered {error.code}: is that a base station?") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise TransportError(f"no base station answers at {url}: {reason}") from error
    except ValueError as error:  # also what is not UTF-8
        raise TransportError(f"{url} sent something else than a status: is that a base station?") from error
    if not isinstance(state, dict):
        raise TransportError(f"{url} sent something else than a status: is that a base station?")
    return state


def _show(state: Mapping[str, Any]) -> None:
    facts = [str(state[name]) for name in ("model", "state", "policy") if name in state]
    click.echo(printable(", ".join(facts)))
    devices = state.get("devices")
    shown = [each for each in devices if isinstance(each, dict)] if isinstance(devices, list) else []
    rows = [_row(each) for each in sorted(shown, key=_natural)]
    print_table(_COLUMNS, rows, right=3)
    if {"experts", "unserved"} <= state.keys():
        served = (_number(state, "experts") or 0) - (_number(state, "unserved") or 0)
        click.echo(printable(f"{served:.0f} of {state['experts']} experts are served"))
    if faults := _number(state, "allow_list_faults"):
        click.echo(f"{faults:.0f} files of the allow list cannot be read: who was admitted stays admitted")


def _natural(device: Mapping[str, Any]) -> list[tuple[int, str]]:
    """By name, and the numbers in it as numbers: device2 comes before device10."""
    pieces = re.findall(r"\d+|\D+", str(device.get("name")))
    return [(int(piece), "") if piece.isdecimal() else (-1, piece.casefold()) for piece in pieces]


def _row(device: Mapping[str, Any]) -> list[object]:
    speed = _number(device, "flops")
    return [
        device.get("name"),
        device.get("hardware"),
        str(device.get("provider", "-")).removesuffix("ExecutionProvider"),
        device.get("experts"),
        device.get("ready"),
        _quantity(device, "memory_bytes", "size"),
        None if speed is None else f"{speed / 1e9:.3g} GFLOP/s",
        _quantity(device, "rtt_s", "time"),
        device.get("queued"),
        device.get("lies"),
        _link(device),
    ]


def _link(device: Mapping[str, Any]) -> str | None:
    """How its data connection is. Others are asked first for what a slow or a paused device has."""
    if device.get("quarantined") is True:
        return "quarantined"
    if device.get("attached", 0) is True:
        return "paused" if device.get("paused") is True else "slow" if device.get("slow") is True else "up"
    return "no data" if device.get("attached", 0) is False else None


def _quantity(device: Mapping[str, Any], name: str, dimension: Dimension) -> str | None:
    value = _number(device, name)
    return None if value is None else format_quantity(value, dimension)


def _number(device: Mapping[str, Any], name: str) -> float | None:
    value = device.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
