"""Pictures for tests: noise whose spectrum falls like that of photographs, one colour cast for each class."""

from __future__ import annotations

import numpy as np

from wdmoe.broadcast.study.study import Material

SIDE = 32


def made_up(count: int, seed: int = 0) -> np.ndarray:
    """(count, 32, 32, 3) uint8."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE))
    falling = 1 / np.maximum(np.hypot(across, down), 1 / SIDE) ** 1.3
    grey, tint = rng.standard_normal((count, SIDE, SIDE, 1)), rng.standard_normal((count, SIDE, SIDE, 3))
    spectrum = np.fft.fft2(grey + 0.4 * tint, axes=(1, 2)) * falling[..., None]
    waves = np.fft.ifft2(spectrum, axes=(1, 2)).real
    waves = waves / waves.std(axis=(1, 2, 3), keepdims=True)
    return np.asarray(np.clip(128 + 45 * waves, 0, 255), np.uint8)


def made_up_material(classes: int = 2, each: int = 6) -> Material:
    """A small division: the first half of every class to choose by, the rest to report on."""
    pixels, labels = made_up(classes * each), np.repeat(np.arange(classes), each)
    numbers = np.arange(len(labels))
    first = numbers % each < each // 2
    blank = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
    return Material(pixels=pixels, labels=labels, choose=numbers[first], test=numbers[~first], blank=blank)
