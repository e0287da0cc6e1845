"""From token ids to text that can be shown: incremental decoding and stop sequences."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from wdmoe.backbone.text.tokenizer import TextTokenizer


class TextStream:
    """Decodes token by token and holds text back while it may still become a stop sequence."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, token_id: int) -> str:
        """Text that is now certain; "" while a character or a possible stop sequence is incomplete."""
        self._held += self._decoder.step(self._tokenizer, token_id) or ""
        found = [i for stop in self._stop if (i := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        safe = len(self._held) - self._longest_beginning()
        text, self._held = self._held[:safe], self._held[safe:]
        return text

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        text, self._held = self._held, ""
        return text

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop sequence."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
