"""How long a layer takes: one latency model for the planner, the simulator and whoever measures quality beside it.

A device k receives n_k activations, computes c_k seconds and returns n_k activations, on its part B_k of the band:

    latency = M + max over k of  n_k (down_k(B_k) + up_k(B_k)) + c_k

Levers change its terms [D]:

- fewer bits per activation: down_k and up_k shrink with them. All have as few, or the devices whose air is dearest,
  or each assignment by its gate weight (`wdmoe.solver.layer.quantization`): then down_k and up_k are means over the
  vectors of k;
- partial sums: n_k counts tokens, not assignments, since a device adds up what it computed for a token;
- multicast: each token is sent once over the whole band, before the devices share the band for the way up. M is what
  that takes, and down_k is 0. It is used where it pays. "weakest": one token after the other, each at the rate of the
  weakest of its devices. "superposition": all at once, see `wdmoe.solver.layer.superposition`; never slower than that;
- analog: as multicast, but without bits, so at no device's rate: see `wdmoe.solver.layer.analog_downlink`. Where
  both are asked for, the faster one is used;
- micro-batches: in m parts, link and compute overlap: with air a and compute c, max(a + c / m, a / m + c).

M is 0 without multicast. Compute is `max(tokens x token_s, expert_s)` for each expert: a roofline, or FLOP alone where
expert_s is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray, IntArray
from wdmoe.solver.bandwidth import Links, allocate_bandwidth
from wdmoe.solver.layer.analog_downlink import Analog, Cast, cast, cast_again
from wdmoe.solver.layer.quantization import BITS, as_widest_of_device, distortion, round_within, vector_bits
from wdmoe.solver.layer.radio_state import RadioState, air_s
from wdmoe.solver.layer.superposition import superpose

MULTICASTS = ("none", "weakest", "superposition")
_TURNS = 8  # of finding out which devices wait for the link and which for compute; two or three are usual


@dataclass(frozen=True, slots=True, kw_only=True)
class Levers:
    """What may be done besides choosing experts and hertz. The defaults are none of it."""

    bits: int = 16  # of a value of an activation on the air, both ways
    coarse_bits: int = 0  # of devices whose air is dearest; 0: none
    coarse_share: float = 0.25  # of the layer's gate weight that may travel with so few, at most
    max_distortion: float = 0.0  # of a token, by fewer bits where its weight is light (`rounding`); 0: all have `bits`
    partial_sums: bool = False
    multicast: str | bool = "none"  # or "weakest", which True means, or "superposition"
    micro_batches: int = 1
    equal_bandwidth: bool = False  # every device gets the same, whatever it needs
    analog: Analog | None = None  # broadcast hidden vectors without bits, where that is faster

    @property
    def broadcasts(self) -> bool:
        """Whether a vector may go to all of its devices at once."""
        return self.multicast != "none" or self.analog is not None

    def __post_init__(self) -> None:
        if isinstance(self.multicast, bool):
            object.__setattr__(self, "multicast", MULTICASTS[self.multicast])
        for name, allowed in (("bits", BITS), ("coarse_bits", (0, *BITS)), ("multicast", MULTICASTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        if self.coarse_bits > self.bits:
            raise ValueError(f"coarse_bits must not be above bits, got {self.coarse_bits} and {self.bits}")
        if not 0 <= self.coarse_share <= 1:
            raise ValueError(f"coarse_share must be 0 to 1, got {self.coarse_share}")
        if self.max_distortion and not distortion(self.bits) <= self.max_distortion <= 1:  # also refuses NaN
            least = f"{distortion(self.bits):.3g}, which {self.bits} bits cost,"
            raise ValueError(f"max_distortion must be 0 (off) or from {least} to 1, got {self.max_distortion}")
        if self.max_distortion and self.coarse_bits:
            raise ValueError("coarse_bits and max_distortion both say who gets fewer bits; use one")
        if not 1 <= self.micro_batches <= 1024:
            raise ValueError(f"micro_batches must be 1 to 1024, got {self.micro_batches}")


@dataclass(frozen=True, slots=True, eq=False)
class LayerTime:
    """What a layer costs."""

    latency_s: float  # infinite where a device with work cannot be reached
    bandwidth_hz: FloatArray  # (devices,)
    device_s: FloatArray  # (devices,) until each is done, without the multicast before it
    multicast_s: float  # 0 where none was sent
    bits: FloatArray  # (tokens, top_k) of a value, 0 where nothing is computed
    vectors: FloatArray  # (devices,) activations up; also down, unless multicast
    down_bits: float  # bits of a value, summed over the vectors that are sent down; amplitudes are none
    up_bits: float
    analog: Cast | None = None  # how vectors went down without bits; None: they went as bits


def layer_time(air: RadioState, levers: Levers, experts: IntArray, device: IntArray, bits: FloatArray) -> LayerTime:
    """Latency of one layer.

    Args:
        experts: (tokens, top_k), -1 where dropped.
        device: (tokens, top_k) the device that computes each, -1 where dropped.
        bits: (tokens, top_k) from `bits_of_assignments`.
    """
    work = _Work(air, levers, experts, device, bits)
    if levers.analog is not None:
        digital = layer_time(air, replace(levers, analog=None), experts, device, bits)
        analog = _after(work, cast(air, levers.analog, device), None)
        return analog if analog.latency_s < digital.latency_s else digital
    unicast = work.timed(0.0)
    if levers.multicast == "none":
        return unicast
    common_s = multicast_s(air, levers, device, bits)
    multicast = work.timed(common_s)
    return multicast if multicast.latency_s < unicast.latency_s else unicast


def time_spent(
    air: RadioState, known: RadioState, levers: Levers, experts: IntArray, device: IntArray, decided: LayerTime
) -> LayerTime:
    """What a layer takes where the channel is another than the one that it was decided for.

    Bands, bits, multicast or not, and the powers of a superposition stay as decided; rates are the real ones, so codes
    are ideally rateless: nothing is sent twice, and nobody sends faster than the channel lets through. Amplitudes are
    sent as often as decided, whatever the channel; it is their distortion that follows the real one.

    Args:
        air: what there is.
        known: what was thought to be; `decided` is the `layer_time` of it.
        experts, device: as in `layer_time`.
    """
    work = _Work(air, levers, experts, device, decided.bits)
    if levers.analog is not None and decided.analog is not None:
        return _after(work, cast_again(air, levers.analog, device, decided.analog), decided.bandwidth_hz)
    if not decided.multicast_s:
        return work.with_band(0.0, decided.bandwidth_hz)
    if levers.multicast == "superposition":
        vector = _token_bits(air, device, decided.bits)
        sent = superpose(vector, device, known.downlink_snr, known.total_hz)
        common_s = sent.seconds_at(air.downlink_snr, air.total_hz)
    else:
        common_s = multicast_s(air, levers, device, decided.bits)
    return work.with_band(common_s, decided.bandwidth_hz)


def multicast_s(air: RadioState, levers: Levers, device: IntArray, bits: FloatArray) -> float:
    """Seconds to send each token once, over the whole band, so that each of its devices can read it; 0: "none"."""
    if levers.multicast == "none":
        return 0.0
    vector = _token_bits(air, device, bits)
    if levers.multicast == "superposition":
        return superpose(vector, device, air.downlink_snr, air.total_hz).seconds
    efficiency = air.downlink_efficiency
    if efficiency is None:
        efficiency = np.log1p(air.downlink_snr) / np.log(2)
    slowest = np.where(device >= 0, efficiency[device], np.inf).min(axis=1, initial=np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(vector > 0, vector / (air.total_hz * slowest), 0.0).sum())


def broadcast_s(air: RadioState, levers: Levers, device: IntArray, bits: FloatArray) -> float:
    """Seconds before the way up, where all of a token's devices are sent to at once: analog, else `multicast_s`."""
    if levers.analog is not None:
        return cast(air, levers.analog, device).seconds
    return multicast_s(air, levers, device, bits)


def _token_bits(air: RadioState, device: IntArray, bits: FloatArray) -> FloatArray:
    """(tokens,) bits of a hidden vector that goes to all its devices at once, as the most exacting wants it."""
    return vector_bits(air.hidden, np.where(device >= 0, bits, 0.0).max(axis=1, initial=0.0))


def bits_of_assignments(air: RadioState, levers: Levers, weights: FloatArray, device: IntArray) -> FloatArray:
    """(tokens, top_k) bits of a value, 0 where nothing is computed.

    Args:
        weights, device: (tokens, top_k) of what is computed; device -1 where nothing is.
    """
    if not levers.max_distortion:
        return np.where(device >= 0, _bits_of_devices(air, levers, weights, device)[device], 0.0)
    each = np.full(air.devices, air.total_hz / air.devices)
    price = air_s(air.links(np.ones(air.devices), downlink=not levers.broadcasts), each)
    bits = round_within(weights, device, price, levers.bits, levers.max_distortion)
    return as_widest_of_device(bits, device) if levers.partial_sums else bits


def mean_vector_bits(air: RadioState, levers: Levers, device: IntArray, bits: FloatArray) -> FloatArray:
    """(devices,) bits of a vector, the mean over a device's assignments."""
    served = device >= 0
    count = np.bincount(device[served], minlength=air.devices).astype(np.float64)
    total = np.bincount(device[served], vector_bits(air.hidden, bits[served]), minlength=air.devices)
    return _mean(total, count, float(vector_bits(air.hidden, np.array(float(levers.bits)))))


def _mean(total: npt.NDArray[np.number], count: FloatArray, none: float) -> FloatArray:
    """total / count, and `none` where nothing was counted."""
    return np.asarray(np.divide(total, count, out=np.full(total.shape, none), where=count > 0), np.float64)


def _bits_of_devices(air: RadioState, levers: Levers, weights: FloatArray, device: IntArray) -> FloatArray:
    """(devices,) bits of a value: few where the air is dear, for at most `coarse_share` of the gate weight."""
    bits = np.full(air.devices, float(levers.bits))
    if not levers.coarse_bits:
        return bits
    carried = np.bincount(device[device >= 0], weights[device >= 0], minlength=air.devices)
    count = np.bincount(device[device >= 0], minlength=air.devices)
    dearest = np.argsort(-count * air.assignment_s(bits), kind="stable")
    within = np.cumsum(carried[dearest]) <= levers.coarse_share * carried.sum()
    bits[dearest[np.logical_and.accumulate(within)]] = levers.coarse_bits
    return bits


def _after(work: _Work, sent: Cast, band: FloatArray | None) -> LayerTime:
    """The layer after vectors went down without bits, with a band that was decided or the best one."""
    time = work.timed(sent.seconds) if band is None else work.with_band(sent.seconds, band)
    return replace(time, analog=sent, down_bits=0.0)


class _Work:
    """What each device has to do in a layer."""

    def __init__(self, air: RadioState, levers: Levers, experts: IntArray, device: IntArray, bits: FloatArray) -> None:
        self._air, self._levers, self._device, self._bits = air, levers, device, bits
        served = device >= 0
        at, sent = device[served], bits[served]
        if levers.partial_sums:
            token = np.broadcast_to(np.arange(len(device))[:, None], device.shape)[served]
            pairs, first = np.unique(token * air.devices + at, return_index=True)
            at, sent = pairs % air.devices, sent[first]
        self.vectors = np.bincount(at, minlength=air.devices).astype(np.float64)
        total = np.bincount(at, vector_bits(air.hidden, sent), minlength=air.devices)
        self._vector = _mean(total, self.vectors, float(vector_bits(air.hidden, np.array(float(levers.bits)))))
        self._value_bits = float(sent.sum())
        self.compute_s = self._computed_s(experts[served], device[served])
        self.parts = np.clip(np.minimum(levers.micro_batches, self.vectors), 1, None)

    def timed(self, common_s: float) -> LayerTime:
        """With the band that the levers ask for, after a multicast of so many seconds; 0: none."""
        if self._levers.equal_bandwidth:
            band = np.full(self._air.devices, self._air.total_hz / self._air.devices)
        else:
            band = self._best_band(self._links(common_s))
        return self.with_band(common_s, band)

    def with_band(self, common_s: float, band: FloatArray) -> LayerTime:
        """With a band that was decided."""
        device_s = self._device_s(self._links(common_s), band)
        latency_s = common_s + float(device_s.max(initial=0.0))
        down = self._value_bits
        if common_s:
            down = float(np.where(self._device >= 0, self._bits, 0.0).max(axis=1, initial=0.0).sum())
        return LayerTime(latency_s, band, device_s, common_s, self._bits, self.vectors, down, self._value_bits)

    def _links(self, common_s: float) -> Links:
        return self._air.links(self._vector, downlink=not common_s)

    def _best_band(self, links: Links) -> FloatArray:
        """Each device waits for the link or for compute; where the guess holds in the end, the band is the best.

        With the guess a device's time is affine in its time on the air, so the allocation is exact; the true time is
        the greater of both guesses, never less.
        """
        on_link = np.ones(self._air.devices, bool)
        best, best_s = np.zeros(self._air.devices), np.inf
        for _ in range(_TURNS):
            load = np.where(on_link, self.vectors, self.vectors / self.parts)
            fixed = np.where(on_link, self.compute_s / self.parts, self.compute_s)
            answer = allocate_bandwidth(load, links, self._air.total_hz, fixed_s=fixed)
            device_s = self._device_s(links, answer.bandwidth_hz)
            if device_s.max(initial=0.0) < best_s or not best_s < np.inf:
                best, best_s = answer.bandwidth_hz, float(device_s.max(initial=0.0))
            now = self._air_s(links, answer.bandwidth_hz) >= self.compute_s
            if (now == on_link).all() or self._levers.micro_batches == 1:
                break
            on_link = now
        return best

    def _device_s(self, links: Links, band_hz: FloatArray) -> FloatArray:
        air, compute = self._air_s(links, band_hz), self.compute_s
        device_s: FloatArray = np.maximum(air + compute / self.parts, air / self.parts + compute)
        return device_s

    def _air_s(self, links: Links, band_hz: FloatArray) -> FloatArray:
        """(devices,) seconds of all its activations; 0 where it has none."""
        busy = self.vectors > 0
        return np.where(busy, self.vectors * np.where(busy, air_s(links, band_hz), 0.0), 0.0)

    def _computed_s(self, experts: IntArray, device: IntArray) -> FloatArray:
        """(devices,) seconds of compute."""
        pairs, tokens = np.unique(device.astype(np.int64) << 32 | experts, return_counts=True)
        where = pairs >> 32
        each = np.maximum(tokens * self._air.token_s[where], self._air.expert_s[where])
        return np.bincount(where, each, minlength=self._air.devices).astype(np.float64)
