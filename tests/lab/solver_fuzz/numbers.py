"""Adversarial arrays: what a caller may hand the solver, by mistake or on purpose."""

from __future__ import annotations

from typing import Any

import numpy as np

EXTREMES = np.array([0.0, 1e-30, 1e-20, 1e-9, 1e-3, 1.0, 1.0, 3.0, 1e3, 1e9, 1e20, 1e30])
LOADS = np.array([0.0, 5e-324, 1e-300, 1e-100, 1e-20, 0.1, 1.0, 7.0, 1e6, 1e20, 1e100])
REFUSED = (np.nan, np.inf, -np.inf, -1.0, -1e-300, 1e301)


class Given:
    """Draws of one case. `wrong` says whether something was made that must be refused."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.style = int(rng.integers(5))
        self.wrong = False
        self._mischief = rng.random() < 0.2

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def one(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def values(self, shape: tuple[int, ...], pool: np.ndarray = EXTREMES) -> np.ndarray:
        """Ordinary, equal, mostly zero, extreme, or everything from 1e-30 to 1e30."""
        rng = self.rng
        if self.style == 0:
            return rng.uniform(0.1, 10.0, shape)
        if self.style == 1:
            return np.full(shape, pool[rng.integers(len(pool))])
        if self.style == 2:
            return np.where(rng.random(shape) < 0.7, 0.0, rng.uniform(0.1, 10.0, shape))
        if self.style == 3:
            return pool[rng.integers(len(pool), size=shape)]
        return np.asarray(10.0 ** rng.uniform(-30, 30, shape))

    def odd(self, array: np.ndarray, *, shape: bool = True, numbers: bool = True) -> Any:
        """The same in another layout or type, or, in one case of five, what must be refused."""
        rng = self.rng
        kind = int(rng.integers(4)) if self._mischief and rng.random() < 0.4 else -1
        if kind == 0 and numbers and array.size and array.dtype == np.float64:
            array = np.array(array)
            array.flat[rng.integers(array.size)] = REFUSED[rng.integers(len(REFUSED))]
        elif kind == 1 and shape and array.ndim:
            array = np.concatenate([array, array[..., :1]], axis=-1) if array.shape[-1] else array[None, None, None]
        elif kind == 2:
            array = np.ma.masked_array(array, mask=rng.random(array.shape) < 0.5)
        elif kind == 3:
            array = array.astype(self.one(object, complex, "U8"))
        else:
            return self._other_layout(array) if rng.random() < 0.15 else array
        self.wrong = True
        return array

    def _other_layout(self, array: np.ndarray) -> Any:
        kind = int(self.rng.integers(4))
        if kind == 0:
            return np.asfortranarray(array)
        if kind == 1 and array.ndim:
            wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
            wide[..., ::2] = array
            return wide[..., ::2]
        if kind == 2:
            return array.tolist() if array.size else array
        frozen = array.copy()
        frozen.flags.writeable = False
        return frozen
