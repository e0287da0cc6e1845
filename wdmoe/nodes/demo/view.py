"""What a person sees while an answer streams: the devices, their links, who works, and the text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from wdmoe.config import LinkEmulation
from wdmoe.nodes.demo.plan import RunPlan, device_names
from wdmoe.nodes.device.link_emulation import shannon_bps
from wdmoe.nodes.local.station_client import Token
from wdmoe.units import format_quantity

_BAR = 16  # characters of the fullest bar
_WIDE = 80  # columns from which on there is room for all of the table
_TEXT_LINES = 8  # of the answer's end, so that the whole view fits a small terminal


class DemoView:
    """One run. Changed by the run, drawn by rich from another thread: every field is replaced, never altered."""

    def __init__(self, model: str, prompt: str, plan: RunPlan, title: str) -> None:
        self._model = model
        self._prompt = prompt
        self._plan = plan
        self._title = title
        self._experts: Mapping[str, int] = {}
        self._phase = ""
        self._tokens: tuple[Token, ...] = ()
        self._text = ""
        self._read = ""

    def starting(self, phase: str) -> None:
        """The fleet is not ready yet."""
        self._phase = phase

    def streaming(self, experts: Mapping[str, int]) -> None:
        """The fleet is ready; device name -> experts it holds."""
        self._phase, self._experts = "", experts

    def token(self, token: Token) -> None:
        """One more token."""
        self._tokens = (*self._tokens, token)
        self._text += shown(token.text)

    def ended(self, text: str) -> None:
        """The answer is complete; this is all of it."""
        self._text = shown(text)

    def reading(self, done: int, of: int) -> None:
        """Held-out text is being read under the same rules."""
        self._read = f", reading held-out text: {done + 1} of {of}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For rich."""
        yield Panel(
            Group(self._devices(options.max_width), self._answer(console, max(options.max_width - 4, 10))),
            title=Text.assemble((self._title, "bold"), f"  {shown(self._model)}: {self._plan.name}"),
            subtitle=self._account(),
            box=ROUNDED,
            padding=(0, 1),
        )

    def _devices(self, width: int) -> Table:
        last = self._tokens[-1] if self._tokens else None
        layers = dict(zip(last.devices, last.layers, strict=True)) if last else {}
        most_layers = max(layers.values(), default=1)
        rates_bps = [_rate_bps(link, self._plan.bandwidth_hz) for link in self._plan.links]
        most_bps = max(rates_bps) or 1.0
        wide = width >= _WIDE
        names = device_names(len(self._plan.links))
        table = Table("device", "link", *([""] if wide else []), "experts", box=SIMPLE_HEAD, expand=True)
        table.columns[-1].justify = "right"
        table.add_column("layers of the last token" if wide else "last token")
        for column in table.columns:
            column.no_wrap = True
        table.columns[0].min_width = max(len(name) for name in names) + 2
        for name, link, rate_bps in zip(names, self._plan.links, rates_bps, strict=True):
            served = layers.get(name, 0)
            bar = "█" * -(-_BAR * served // most_layers) if wide else ""
            worked = Text.assemble((bar, "green"), f" {served}" if served else "")
            table.add_row(
                Text(f"● {name}", "bold green") if served else Text(f"○ {name}", "dim"),
                _strength(link, self._plan.bandwidth_hz),
                *([Text("━" * max(round(_BAR * rate_bps / most_bps), 1), "cyan")] if wide else []),
                str(self._experts.get(name, "-")),
                worked if layers else "",
            )
        return table

    def _answer(self, console: Console, width: int) -> Group:
        if self._phase:
            return Group(Text(self._phase, "yellow"))
        prompt = Text.assemble(("> ", "bold cyan"), (shown(" ".join(self._prompt.split())), "cyan"))
        prompt.truncate(2 * width, overflow="ellipsis")
        lines = Text(self._text).wrap(console, width)
        return Group(prompt, *lines[-_TEXT_LINES:], *[Text("")] * (1 if len(lines) else 2))

    def _account(self) -> str:
        if not self._tokens:
            return ""
        spent_s = self._tokens[-1].at_s - self._tokens[0].at_s
        rate = f"{(len(self._tokens) - 1) / spent_s:.1f} tokens/s, " if spent_s > 0 else ""
        return (
            f"{len(self._tokens)} tokens, {rate}gate weight dropped {self._tokens[-1].dropped_weight:.1%}{self._read}"
        )


def _rate_bps(link: LinkEmulation, band_hz: float) -> float:
    """To the device, with the whole band where one is shared."""
    return shannon_bps(band_hz, link.downlink_snr_hz) if band_hz else link.downlink_bps


def _strength(link: LinkEmulation, band_hz: float) -> str:
    if band_hz:
        return f"SNR {10 * math.log10(link.downlink_snr_hz / band_hz):.0f} dB"
    return format_quantity(link.downlink_bps, "rate") if link.downlink_bps else "not limited"


def shown(text: str) -> str:
    """The text without what would steer a terminal: a model may write anything."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
