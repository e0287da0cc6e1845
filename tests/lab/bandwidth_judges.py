"""Random bandwidth problems, and two general solvers that know nothing of ours to judge the answers."""

from __future__ import annotations

import warnings
from typing import Any

import cvxpy
import numpy as np
from scipy.optimize import minimize

from wdmoe.arrays import BoolArray, FloatArray
from wdmoe.solver import Links
from wdmoe.solver.reference import bandwidth as reference

TOTAL_HZ = 100e6
BITS = 65536.0
VIOLATION = 1e-9  # relative: what SLSQP may miss a constraint by


def draw_case(
    rng: np.random.Generator, blocks: int | None = None, devices: int | None = None, flat: bool | None = None
) -> tuple[FloatArray, Links]:
    """load, links: up to 64 x 64, 40 dB spread of gains, often zero loads, one device that may be hopeless and idle."""
    blocks, devices = blocks or int(rng.integers(1, 65)), devices or int(rng.integers(1, 65))
    flat = bool(rng.integers(2)) if flat is None else flat
    load = rng.poisson(rng.uniform(1, 40), (blocks, devices)).astype(float)
    load[rng.random(load.shape) < rng.choice([0.0, 0.3, 0.8])] = 0
    snr = TOTAL_HZ / 8 * 10 ** rng.uniform(0, 4, (2, devices)) * 10 ** rng.uniform(-1, 1)
    if rng.random() < 0.2:
        load[:, 0], snr[:, 0] = 0, 0
    compute = rng.uniform(0, 2e-3, devices) * rng.integers(2)
    names = ("downlink_efficiency", "uplink_efficiency") if flat else ("downlink_snr_hz", "uplink_snr_hz")
    rates = np.log2(1 + snr / TOTAL_HZ) if flat else snr
    qualities: dict[str, Any] = dict(zip(names, rates, strict=True))
    links = Links(downlink_bits=BITS, uplink_bits=BITS, compute_s=compute, **qualities)
    return load, links


class Scaled:
    """A problem without idle devices, its numbers near 1: without that the general solvers lose digits."""

    def __init__(self, load: FloatArray, links: Links) -> None:
        used = load.any(axis=0)
        self.load, self.table, self.flat = load[load.any(axis=1)][:, used], links.table[:, used], links.flat
        if not self.load.size:
            return
        n = self.load.shape[1]
        alone = reference.seconds_per_token(self.table, self.flat, np.full(n, TOTAL_HZ))
        self.guess = self.load.max(axis=0) * alone
        self.guess /= self.guess.sum()  # shares of the band; each solver's share is counted in units of it
        self.once = self.seconds(np.ones(n))
        self.unit = (self.load * self.once).max(axis=1).sum()

    def seconds(self, share: FloatArray) -> FloatArray:
        """(devices,) per token, compute included."""
        each = reference.seconds_per_token(self.table, self.flat, share * self.guess * TOTAL_HZ)
        return np.asarray(each + self.table[4])

    def slopes(self, share: FloatArray) -> FloatArray:
        """(devices,) derivative of `seconds` by the share."""
        band, slope = share * self.guess * TOTAL_HZ, np.zeros(len(share))
        for bits, quality in zip(self.table[:2], self.table[2:4], strict=True):
            ratio = quality / band
            rate = band * (quality if self.flat else np.log1p(ratio) / np.log(2))
            gain = quality if self.flat else (np.log1p(ratio) - ratio / (1 + ratio)) / np.log(2)
            slope = slope - bits * gain / rate**2
        return np.asarray(slope * self.guess * TOTAL_HZ)

    def times(self, log_share: FloatArray) -> FloatArray:
        """(blocks, devices) in units of `unit`."""
        return np.asarray(self.load * self.seconds(np.exp(log_share)) / self.unit)

    def latency(self, share: FloatArray) -> float:
        """Of shares made feasible, seconds."""
        band = np.maximum(share, 1e-12) * self.guess
        return float(reference.latency(self.load, self.table, self.flat, band / max(band.sum(), 1.0) * TOTAL_HZ))


def clarabel(load: FloatArray, links: Links) -> tuple[float, float, float]:
    """Least latency by a conic interior-point method: as it says, of its bands made feasible, its own seconds."""
    scaled = Scaled(load, links)
    if not scaled.load.size:
        return 0.0, 0.0, 0.0
    _, _, down, up, compute = scaled.table
    guess, once = scaled.guess, scaled.once
    share, each = cvxpy.Variable(len(compute)), cvxpy.Variable(len(compute))
    seconds = compute / once
    for quality in (down, up):
        if scaled.flat:
            rate, most = share, quality
        else:
            snr = quality / TOTAL_HZ / guess
            most = np.log2(1 + snr)
            rate = cvxpy.multiply(-cvxpy.rel_entr(share, share + snr), 1 / np.log1p(snr))
        seconds = seconds + cvxpy.multiply(BITS / TOTAL_HZ / guess / most / once, cvxpy.inv_pos(rate))
    worst = [
        cvxpy.max(cvxpy.multiply((row * once / scaled.unit)[row > 0], each[np.flatnonzero(row)])) for row in scaled.load
    ]
    problem = cvxpy.Problem(cvxpy.Minimize(sum(worst)), [seconds <= each, guess @ share <= 1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        problem.solve(solver=cvxpy.CLARABEL)
    if problem.status not in ("optimal", "optimal_inaccurate"):
        raise cvxpy.SolverError(problem.status)
    # its own value is of a point that is feasible only nearly
    return problem.value * scaled.unit, scaled.latency(share.value), problem.solver_stats.solve_time


def slsqp(load: FloatArray, links: Links, few: bool = True, rounds: int = 60) -> tuple[float, bool]:
    """Latency of the bands that SLSQP ends with, made feasible, and whether it says that it is done.

    Minimises sum_i T_i over T and the logarithms of the shares, subject to T_i >= load_ik t_k(share_k) and to the band,
    with exact gradients. Up to 64 x 64 constraints are too many for its dense quadratic programs, and few of them bind;
    so it gets a few, then those as well that its answer violates, until it violates none. That loses nothing: with
    fewer constraints the optimum can only be lower, and an answer that meets all of them is no lower than the optimum
    of the whole. It starts from a guess of the shares in proportion to what each device would take alone, never from
    an answer of ours, and each round from where the one before it ended. `few=False` gives it all from the start.
    """
    scaled = Scaled(load, links)
    if not scaled.load.size:
        return 0.0, True
    log_share = np.zeros(len(scaled.guess))
    kept = first_constraints(scaled.times(log_share)) if few else scaled.load > 0
    for _ in range(rounds):
        log_share, done = slsqp_with(scaled, kept, log_share)
        violated = scaled.times(log_share) > (1 + VIOLATION) * slowest(scaled, kept, log_share)[:, None]
        if done and not violated.any():
            return scaled.latency(np.exp(log_share)), True
        kept |= violated & near_slowest(scaled.times(log_share))
    return scaled.latency(np.exp(log_share)), False


def first_constraints(times: FloatArray) -> BoolArray:
    """(blocks, devices) bool: the slowest device of each block, and each device where it comes nearest to that."""
    kept: BoolArray = np.asarray(times == times.max(axis=1, keepdims=True))
    kept[(times / times.max(axis=1, keepdims=True)).argmax(axis=0), np.arange(times.shape[1])] = True
    return kept


def slowest(scaled: Scaled, kept: BoolArray, log_share: FloatArray) -> FloatArray:
    """(blocks,) of the devices whose constraints are kept."""
    return np.asarray(np.where(kept, scaled.times(log_share), 0.0).max(axis=1))


def near_slowest(times: FloatArray) -> BoolArray:
    """Of the violated constraints these are added: most others are met once these are."""
    return np.asarray(times >= 0.9 * times.max(axis=1, keepdims=True))


def slsqp_with(scaled: Scaled, kept: BoolArray, log_share: FloatArray) -> tuple[FloatArray, bool]:
    """One run of SLSQP with some of the constraints: logarithms of the shares, and whether it says that it is done."""
    (m, n), (rows, columns) = kept.shape, np.nonzero(kept)
    unit = slowest(scaled, kept, log_share)  # of each T: all variables are near 1, or logarithms
    weight, number = scaled.load[rows, columns] / scaled.unit / unit[rows], np.arange(len(rows))
    price = n * unit  # and the second derivatives of the objective are near 1, as SLSQP assumes at first

    def slack(x: FloatArray) -> FloatArray:
        share = np.exp(x[:n])
        return np.append(x[n + rows] - weight * scaled.seconds(share)[columns], 1 - scaled.guess @ share)

    def slope(x: FloatArray) -> FloatArray:
        share = np.exp(x[:n])
        out = np.zeros((len(rows) + 1, n + m))
        out[number, n + rows] = 1
        out[number, columns] = -weight * (scaled.slopes(share) * share)[columns]
        out[-1, :n] = -scaled.guess * share
        return out

    found = minimize(
        lambda x: x[n:] @ price,
        np.concatenate([log_share, np.ones(m)]),
        jac=lambda x: np.concatenate([np.zeros(n), price]),
        method="SLSQP",
        constraints={"type": "ineq", "fun": slack, "jac": slope},
        options={"ftol": 1e-12, "maxiter": 300},
    )
    used = scaled.guess @ np.exp(found.x[:n])
    return found.x[:n] - np.log(max(used, 1.0)), bool(found.success)
