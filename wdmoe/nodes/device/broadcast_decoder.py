"""A broadcast decoder in an ONNX Runtime session. No torch in here."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from wdmoe.arrays import Float32Array
from wdmoe.broadcast.codec.tiling import SIDE, FloatTiles
from wdmoe.errors import ExpertError
from wdmoe.moe.providers import cpu_chain, session_options

_NUMBERS = ("snr_db", "share", "kept", "user")
_MOST_TOKENS, _MOST_SLOTS = SIDE**2, 256


class OnnxDecoder:
    """One user's decoder. One thread at a time calls `run`."""

    def __init__(self, model: bytes, threads: int) -> None:
        """Open a file as `wdmoe.broadcast.codec.decoder_export` writes it.

        Raises:
            ExpertError: the runtime cannot open it, or it is no such decoder.
        """
        try:
            self._session = ort.InferenceSession(
                model, session_options(threads), providers=[name for name, _ in cpu_chain()]
            )
        except Exception as error:  # the runtime has a dozen exception types with no common base
            raise ExpertError(f"ONNX Runtime cannot open the decoder: {_first_line(error)}") from error
        self._session.disable_fallback()
        self.tokens, self.slots = _sizes(self._session)

    def run(self, heard: Float32Array, snr_db: Float32Array, share: Float32Array, kept: int, user: int) -> FloatTiles:
        """Decode some blocks.

        Args:
            heard: (block, use, 2) of `tokens` times `kept` uses.
            snr_db, share: (block,).
        Returns:
            (block, 32, 32, 3) float32, 0 to 255, not clipped; what is not a number is grey.
        Raises:
            ExpertError: the runtime failed.
        """
        blocks = len(heard)
        slots = np.zeros((blocks, self.tokens, self.slots, 2), np.float32)
        slots[:, :, :kept] = heard.reshape(blocks, self.tokens, kept, 2)
        told = (snr_db, share, np.full(blocks, kept, np.float32), np.full(blocks, user, np.float32))
        try:
            (pictures,) = self._session.run(["pictures"], {"heard": slots, **dict(zip(_NUMBERS, told, strict=True))})
        except Exception as error:  # as above
            raise ExpertError(f"ONNX Runtime failed in the decoder: {_first_line(error)}") from error
        if pictures.shape != (blocks, 3, SIDE, SIDE):
            raise ExpertError(f"the decoder gave {pictures.shape} for {blocks} blocks")
        tiles: FloatTiles = np.nan_to_num(pictures, nan=0.5, posinf=1.0, neginf=0.0).transpose(0, 2, 3, 1) * 255
        return tiles


def _sizes(session: Any) -> tuple[int, int]:
    """(tokens, slots) of a decoder."""
    inputs = {end.name: (end.type, list(end.shape)) for end in session.get_inputs()}
    outputs = [(end.name, end.type, len(end.shape)) for end in session.get_outputs()]
    kind, shape = inputs.pop("heard", ("", []))
    fits = kind == "tensor(float)" and len(shape) == 4 and shape[3] == 2 and not isinstance(shape[0], int)
    numbers = {name: (kind, len(shape)) for name, (kind, shape) in inputs.items()}
    if (
        not fits
        or numbers != dict.fromkeys(_NUMBERS, ("tensor(float)", 1))
        or outputs != [("pictures", "tensor(float)", 4)]
    ):
        raise ExpertError("the file is no decoder of a broadcast: its inputs or outputs are others")
    tokens, slots = shape[1:3]
    if not (
        isinstance(tokens, int) and 0 < tokens <= _MOST_TOKENS and isinstance(slots, int) and 0 < slots <= _MOST_SLOTS
    ):
        raise ExpertError(f"the decoder must have fixed sizes within bounds, got {tokens} tokens of {slots} slots")
    return tokens, slots


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
