# cython: language_level=3, embedsignature=False, freethreading_compatible=False
"""Thin bridge to native/wdmoe: checks lengths, hands over pointers, releases the GIL. Types: _native.pyi.

C++ trusts every length it is given, so each function here compares them first. Values (indices, finite numbers) are
checked in C++, where it costs one pass.
"""

import numpy as np

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS,
    PyBUF_FORMAT,
    PyBUF_SIMPLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.stdint cimport int32_t, uint8_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector


cdef extern from "wdmoe/checks.hpp" namespace "wdmoe" nogil:
    size_t first_outside(const double* values, size_t n, double low) noexcept
    cbool all_finite(const float* values, size_t n) noexcept
    const double kSmallestPositive


cdef extern from "wdmoe/combine.hpp" namespace "wdmoe" nogil:
    void add_rows(const float* values, const int32_t* rows, const float* weights, size_t n, size_t tokens,
                  size_t hidden, float* out) except +
    void scale_rows(const float* factors, size_t tokens, size_t hidden, float* out) noexcept


cdef extern from "wdmoe/norms.hpp" namespace "wdmoe" nogil:
    cdef enum class Oddity(int):
        none
        not_finite
        too_small
        too_large

    cdef struct OddRow:
        Oddity kind
        size_t row

    OddRow find_odd_row "wdmoe::odd_row"(
        const float* partial, size_t tokens, size_t hidden, const int32_t* experts, const int32_t* counts,
        size_t n_counts, const int32_t* rows, const float* weights, size_t pairs, const double* low,
        const double* high, size_t n_experts, double least_share) except +


cdef extern from "wdmoe/grouping.hpp" namespace "wdmoe" nogil:
    cdef cppclass DeviceSpan:
        int32_t device
        size_t tokens_begin, tokens_end, experts_begin, experts_end, pairs_begin, pairs_end

    cdef cppclass Grouping:
        vector[DeviceSpan] spans
        size_t tokens_total, experts_total, pairs_total, unserved
        void count(const int32_t* experts, size_t tokens, size_t k, const int32_t* device_of,
                   size_t n_experts) except +
        void fill(const float* weights, int32_t* token_rows, int32_t* experts, int32_t* counts, int32_t* rows,
                  float* pair_weights) noexcept


cdef extern from "wdmoe/bandwidth_blocks.hpp" namespace "wdmoe" nogil:
    cdef cppclass BandwidthTask:
        size_t blocks, devices
        const double* load
        const double* fixed
        const double* links
        cbool flat
        double total_hz
        const double* floor_hz
        const double* cap_hz
        const double* start_hz
        const double* start_weight
        double tolerance
        size_t limit

    cdef cppclass BandwidthAnswer:
        double latency, lower_bound, price
        int status
        size_t iterations

    cdef cppclass BandwidthArrays:
        double* band_hz
        double* block_latency
        double* weight

    BandwidthAnswer solve_bandwidth(const BandwidthTask& task, const BandwidthArrays& out) except +


cdef extern from "wdmoe/selection.hpp" namespace "wdmoe" nogil:
    cdef cppclass PruneOptions:
        cbool cosine, renormalise, wlr_sum
        double theta, theta_step, gamma

    cdef cppclass PruneResult:
        double wlr, theta

    size_t native_top_k "wdmoe::top_k"(
        const double* gate, size_t tokens, size_t n_experts, size_t k, const uint8_t* available, cbool normalise,
        int32_t* experts, double* weights) except +
    PruneResult native_prune "wdmoe::prune"(
        int32_t* experts, double* weights, size_t tokens, size_t k, const double* latency, size_t latency_stride,
        size_t n_experts, const uint8_t* available, const PruneOptions& options, double* dropped_weight) except +


    double native_keep_marked "wdmoe::keep_marked"(
        int32_t* experts, double* weights, size_t tokens, size_t k, const uint8_t* kept, cbool renormalise,
        double* dropped_weight) noexcept


cdef extern from "wdmoe/by_device.hpp" namespace "wdmoe" nogil:
    cdef cppclass Assignments:
        size_t tokens, top_k, devices
        const int32_t* device
        const double* weight

    void native_resolve "wdmoe::resolve"(
        const int32_t* experts, const double* given_weight, size_t n, const int32_t* device_of, size_t n_experts,
        size_t devices, int32_t* device, double* weight) except +


cdef extern from "wdmoe/hertz.hpp" namespace "wdmoe" nogil:
    void native_needed_hz "wdmoe::needed_hz"(
        const double* links, size_t devices, cbool flat, const double* token_s, size_t n, double* out) except +


cdef extern from "wdmoe/bottleneck.hpp" namespace "wdmoe" nogil:
    void native_shed_bottleneck "wdmoe::shed_bottleneck"(
        const Assignments& given, const double* token_s, double light, uint8_t* kept) except +


cdef extern from "wdmoe/budget.hpp" namespace "wdmoe" nogil:
    cdef cppclass BudgetAnswer:
        double upper_bound, lower_bound_s
        cbool fits

    BudgetAnswer native_choose_within_budget "wdmoe::choose_within_budget"(
        const Assignments& given, const double* links, cbool flat, double total_hz, double budget_s,
        uint8_t* kept) except +
    BudgetAnswer native_choose_least_budget "wdmoe::choose_least_budget"(
        const Assignments& given, const double* links, cbool flat, double total_hz, double goal, double most_s,
        uint8_t* kept) except +


cdef extern from "wdmoe/copies.hpp" namespace "wdmoe" nogil:
    cdef cppclass CopyTask:
        size_t tokens, top_k, n_experts, devices
        const int32_t* experts
        const uint8_t* holders
        const double* token_s
        const double* busy_s

    cdef cppclass CopyChooser:
        CopyChooser(const CopyTask& task) except +
        double choose(int32_t* device) except +


cdef extern from "wdmoe/replacing.hpp" namespace "wdmoe" nogil:
    cdef cppclass ReplaceTask:
        size_t tokens, top_k, n_experts
        const double* weight
        const double* similarity
        const double* seconds
        double least_similarity, times_faster, most_share

    void native_replace_far "wdmoe::replace_far"(const ReplaceTask& task, int32_t* experts) except +


# Looked up once: for one token, looking names up costs as much as the work.
cdef object empty = np.empty
cdef object INT32 = np.dtype(np.int32)
cdef object FLOAT32 = np.dtype(np.float32)
cdef object NDARRAY = np.ndarray
cdef object MASKED = np.ma.MaskedArray
cdef Py_ssize_t MUCH_BYTES = 32768  # with less there is no time for another thread: the GIL is kept


cdef int unmasked(str name, object given) except -1:
    """Refuse a masked array. NumPy, and the buffer that it hands out, leave the mask out without a word."""
    if type(given) is NDARRAY:
        return 0
    cdef bint rows = isinstance(given, (list, tuple)) and any([isinstance(row, MASKED) for row in given])
    if rows or isinstance(given, MASKED):
        raise ValueError(f"{name} must not be a masked array: fill in or take out what is masked")
    return 0


cdef void* data_of(object array) except NULL:
    """Where a non-empty contiguous array of our own making begins. The caller keeps the array alive."""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_SIMPLE)
    cdef void* start = view.buf
    PyBuffer_Release(&view)
    return start


cdef class Memory:
    """The memory of a plain C-contiguous array, held as long as this lives. A typed memoryview costs five times that."""

    cdef Py_buffer view
    cdef bint held

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef Memory memory_of(object array, int dimensions, char format):
    """None where it is anything else, or empty: the slow way judges it."""
    if type(array) is not NDARRAY:
        return None
    cdef Memory memory = Memory.__new__(Memory)
    try:
        PyObject_GetBuffer(array, &memory.view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
    except ValueError:
        return None
    memory.held = True
    if memory.view.ndim != dimensions or memory.view.format[0] != format or memory.view.format[1] != 0:
        return None
    return memory if memory.view.len > 0 else None


cdef class DeviceWork:
    """One device's part of a layer: see _native.pyi."""

    cdef readonly int device
    cdef readonly object token_rows, rows, weights
    cdef readonly tuple experts, counts

    def __repr__(self):
        return f"DeviceWork(device={self.device}, experts={self.experts}, counts={self.counts})"


cdef class Groups:
    """Work of all devices: see _native.pyi."""

    cdef readonly tuple works
    cdef readonly Py_ssize_t unserved

    def __len__(self):
        return len(self.works)

    def __iter__(self):
        return iter(self.works)

    def __getitem__(self, Py_ssize_t position):
        return self.works[position]


cdef tuple ints(const int32_t* values, size_t n):
    return tuple([values[i] for i in range(n)])


cdef DeviceWork device_work(const DeviceSpan& span, object flat, object weights, const int32_t* values,
                            size_t token_slots, size_t expert_slots):
    # flat holds token_rows | experts | counts | rows, one after the other
    cdef DeviceWork work = DeviceWork.__new__(DeviceWork)
    cdef size_t count = span.experts_end - span.experts_begin
    cdef size_t rows_at = token_slots + 2 * expert_slots
    work.device = span.device
    work.token_rows = flat[span.tokens_begin : span.tokens_end]
    work.experts = ints(values + token_slots + span.experts_begin, count)
    work.counts = ints(values + token_slots + expert_slots + span.experts_begin, count)
    work.rows = flat[rows_at + span.pairs_begin : rows_at + span.pairs_end]
    work.weights = weights[span.pairs_begin : span.pairs_end]
    return work


def group_by_device(experts not None, weights not None, device_of not None):
    cdef Memory chosen = memory_of(experts, 2, c"i"), gate = memory_of(weights, 2, c"f")
    cdef Memory servers = memory_of(device_of, 1, c"i")
    if chosen is None or gate is None or servers is None:
        unmasked("experts", experts)
        unmasked("weights", weights)
        unmasked("device_of", device_of)
        return grouped_of_any(experts, weights, device_of)
    require_shape_of_experts(chosen.view.shape[0], chosen.view.shape[1], gate.view.shape[0], gate.view.shape[1])
    return grouped(<const int32_t*>chosen.view.buf, <const float*>gate.view.buf, chosen.view.shape[0],
                   chosen.view.shape[1], <const int32_t*>servers.view.buf, servers.view.shape[0])


cdef int require_shape_of_experts(size_t tokens, size_t k, size_t rows, size_t columns) except -1:
    if rows != tokens or columns != k:
        raise ValueError(f"weights must have the shape of experts ({tokens}, {k}), got ({rows}, {columns})")
    return 0


cdef Groups grouped_of_any(const int32_t[:, ::1] experts, const float[:, ::1] weights, const int32_t[::1] device_of):
    cdef size_t tokens = experts.shape[0], k = experts.shape[1], n_experts = device_of.shape[0]
    require_shape_of_experts(tokens, k, weights.shape[0], weights.shape[1])
    if tokens * k == 0:
        return grouped(NULL, NULL, 0, k, NULL, n_experts)
    return grouped(&experts[0, 0], &weights[0, 0], tokens, k, &device_of[0] if n_experts > 0 else NULL, n_experts)


cdef Groups grouped(const int32_t* experts, const float* weights, size_t tokens, size_t k, const int32_t* device_of,
                    size_t n_experts):
    if tokens * k > 0x7FFFFFFF:
        raise ValueError(f"experts must have fewer than 2**31 entries, got {tokens * k}")
    cdef Grouping grouping
    cdef Groups groups = Groups.__new__(Groups)
    groups.works = ()
    if tokens * k == 0:
        return groups
    if tokens * k > <size_t>MUCH_BYTES // 8:
        with nogil:
            grouping.count(experts, tokens, k, device_of, n_experts)
    else:
        grouping.count(experts, tokens, k, device_of, n_experts)
    groups.unserved = grouping.unserved
    if grouping.pairs_total == 0:
        return groups
    cdef size_t experts_at = grouping.tokens_total, counts_at = experts_at + grouping.experts_total
    cdef size_t rows_at = counts_at + grouping.experts_total
    cdef object flat = empty(rows_at + grouping.pairs_total, INT32)
    cdef object pair_weights = empty(grouping.pairs_total, FLOAT32)
    cdef int32_t* out = <int32_t*>data_of(flat)
    cdef float* out_weights = <float*>data_of(pair_weights)
    if tokens * k > <size_t>MUCH_BYTES // 8:
        with nogil:
            grouping.fill(weights, out, out + experts_at, out + counts_at, out + rows_at, out_weights)
    else:
        grouping.fill(weights, out, out + experts_at, out + counts_at, out + rows_at, out_weights)
    groups.works = tuple([
        device_work(grouping.spans[i], flat, pair_weights, out, grouping.tokens_total, grouping.experts_total)
        for i in range(grouping.spans.size())
    ])
    return groups


cdef object singles(str name, object given, int dimensions):
    """Real numbers as C-contiguous float32; those beyond its range become infinite."""
    array = regular(name, given)
    if array.dtype.kind not in "fiub" or array.ndim != dimensions:
        raise ValueError(f"{name} must be real numbers of {dimensions} dimensions, got {array.dtype} {array.shape}")
    if array.dtype == FLOAT32:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


cdef object row_numbers(str name, object given):
    """Whole numbers as C-contiguous int32. What does not fit is refused: cut to 32 bits it would be another row."""
    array = regular(name, given)
    if array.ndim != 1 or array.dtype.kind not in ("iu" if array.size else "iuf"):  # an empty list is float64
        raise ValueError(f"{name} must be whole numbers of 1 dimension, got {array.dtype} {array.shape}")
    if array.size and (array.min() < 0 or array.max() > 0x7FFFFFFF):
        raise ValueError(f"{name} must be 0 to {0x7FFFFFFF}, got {array.min()} to {array.max()}")
    return np.ascontiguousarray(array, INT32)


cdef void add_reply(float[:, ::1] out, object partial, object rows, object weights, str name) except *:
    cdef const float[:, ::1] values
    cdef const int32_t[::1] at
    cdef const float[::1] factors
    unmasked(f"{name}: partial", partial)
    unmasked(f"{name}: rows", rows)
    try:
        values, at = partial, rows
    except (TypeError, ValueError):  # another type or layout; converting first would cost more than the sum
        values, at = singles(f"{name}: partial", partial, 2), row_numbers(f"{name}: rows", rows)
    factors = None if weights is None else singles(f"{name}: weights", weights, 1)
    cdef size_t n = values.shape[0], tokens = out.shape[0], hidden = out.shape[1]
    if values.shape[1] != out.shape[1]:
        raise ValueError(f"{name}: partial must be (n, {hidden}), got ({n}, {values.shape[1]})")
    if at.shape[0] != values.shape[0]:
        raise ValueError(f"{name}: rows must have one entry for each of the {n} partial rows, got {at.shape[0]}")
    if factors is not None and factors.shape[0] != values.shape[0]:
        raise ValueError(f"{name}: weights must have one entry for each of the {n} partial rows, "
                         f"got {factors.shape[0]}")
    if n == 0 or hidden == 0:
        return
    if tokens > 0 and &values[0, 0] < &out[0, 0] + tokens * hidden and &out[0, 0] < &values[0, 0] + n * hidden:
        raise ValueError(f"{name}: partial must not share memory with out")  # rows would be read after their change
    cdef const float* scale = NULL
    if factors is not None:
        scale = &factors[0]
    try:
        with nogil:
            add_rows(&values[0, 0], &at[0], scale, n, tokens, hidden, &out[0, 0] if tokens > 0 else NULL)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


cdef bint add_plain(object out, object partial, object rows, object weights) except -1:
    """The usual case of `add_reply` in a fraction of its time. False, with nothing done, where it is not that."""
    cdef Memory sums = memory_of(out, 2, c"f"), values = memory_of(partial, 2, c"f"), at = memory_of(rows, 1, c"i")
    cdef Memory factors = None if weights is None else memory_of(weights, 1, c"f")
    if sums is None or values is None or at is None or (factors is None and weights is not None) or sums.view.readonly:
        return False
    cdef size_t n = values.view.shape[0], hidden = values.view.shape[1], tokens = sums.view.shape[0]
    if <size_t>sums.view.shape[1] != hidden or <size_t>at.view.shape[0] != n:
        return False
    if factors is not None and <size_t>factors.view.shape[0] != n:
        return False
    cdef float* to = <float*>sums.view.buf
    cdef const float* first = <const float*>values.view.buf
    if first < to + tokens * hidden and to < first + n * hidden:
        return False
    cdef const float* scale = NULL
    if factors is not None:
        scale = <const float*>factors.view.buf
    cdef const int32_t* places = <const int32_t*>at.view.buf
    if values.view.len > MUCH_BYTES:
        with nogil:
            add_rows(first, places, scale, n, tokens, hidden, to)
    else:
        add_rows(first, places, scale, n, tokens, hidden, to)
    return True


def combine_partials(out not None, partial not None, rows not None, weights=None):
    try:
        if add_plain(out, partial, rows, weights):
            return
    except ValueError as error:
        raise ValueError(f"combine_partials: {error}") from None
    unmasked("out", out)
    add_reply(out, partial, rows, weights, "combine_partials")


def weighted_sum(outputs not None, weights not None):
    cdef Memory factors = memory_of(weights, 1, c"f")
    cdef Memory values, sums
    cdef Py_ssize_t at = 0
    if factors is None or len(outputs) != factors.view.shape[0]:
        raise ValueError(f"weights must be (outputs,) float32, got {np.shape(weights)} for {len(outputs)} outputs")
    cdef object total = None
    cdef int32_t row = 0
    for output in outputs:
        values = memory_of(output, 2, c"f")
        if values is None or values.view.shape[0] != 1 or (at > 0 and values.view.len != sums.view.len):
            raise ValueError(f"outputs[{at}] must be (1, hidden) float32, as wide as the others, "
                             f"got {np.shape(output)}")
        if at == 0:
            total = np.zeros((1, values.view.shape[1]), FLOAT32)
            sums = memory_of(total, 2, c"f")
        add_rows(<const float*>values.view.buf, &row, <const float*>factors.view.buf + at, 1, 1,
                 values.view.shape[1], <float*>sums.view.buf)
        at += 1
    return total


def combine(Py_ssize_t tokens, Py_ssize_t hidden, replies not None, scale=None):
    if tokens < 0 or hidden < 0:
        raise ValueError(f"tokens and hidden must not be negative, got {tokens} and {hidden}")
    result = np.zeros((tokens, hidden), np.float32)
    cdef float[:, ::1] out = result
    cdef const float[::1] factors
    for position, (partial, rows) in enumerate(replies):
        add_reply(out, partial, rows, None, f"replies[{position}]")
    if scale is not None:
        factors = singles("scale", scale, 1)
        if factors.shape[0] != tokens:
            raise ValueError(f"scale must have one entry for each of the {tokens} tokens, got {factors.shape[0]}")
        if tokens > 0 and hidden > 0:
            with nogil:
                scale_rows(&factors[0], tokens, hidden, &out[0, 0])
    return result


def is_finite(values not None):
    cdef Memory plain = memory_of(values, 2, c"f")
    if plain is not None and plain.view.len <= MUCH_BYTES:
        return all_finite(<const float*>plain.view.buf, plain.view.len // 4)
    given = regular("values", values)
    flat = singles("values", given.reshape(-1), 1)
    cdef const float[::1] view = flat
    cdef size_t n = view.shape[0]
    cdef cbool finite
    if n == 0:
        return True
    with nogil:
        finite = all_finite(&view[0], n)
    return finite


def odd_row(partial not None, experts not None, counts not None, rows not None, weights not None,
            low not None, high not None, double least_share):
    cdef Memory values = memory_of(partial, 2, c"f"), at = memory_of(rows, 1, c"i")
    cdef Memory factors = memory_of(weights, 1, c"f")
    cdef Memory least = memory_of(low, 1, c"d"), most = memory_of(high, 1, c"d")
    cdef vector[int32_t] ids = experts
    cdef vector[int32_t] numbers = counts
    if values is None or at is None or factors is None or least is None or most is None:
        return odd_row_of_any(partial, ids, numbers, rows, weights, low, high, least_share)
    cdef size_t pairs = at.view.shape[0], n = least.view.shape[0]
    require_alike(pairs, factors.view.shape[0], ids.size(), numbers.size(), n, most.view.shape[0])
    cdef size_t tokens = values.view.shape[0], hidden = values.view.shape[1]
    cdef const float* first = <const float*>values.view.buf
    cdef const int32_t* places = <const int32_t*>at.view.buf
    cdef const float* scale = <const float*>factors.view.buf
    cdef const double* lows = <const double*>least.view.buf
    cdef const double* highs = <const double*>most.view.buf
    cdef OddRow found
    try:
        if values.view.len > MUCH_BYTES:
            with nogil:
                found = find_odd_row(first, tokens, hidden, ids.data(), numbers.data(), ids.size(), places, scale, pairs,
                                     lows, highs, n, least_share)
        else:
            found = find_odd_row(first, tokens, hidden, ids.data(), numbers.data(), ids.size(), places, scale, pairs,
                                 lows, highs, n, least_share)
    except ValueError as error:
        raise ValueError(f"odd_row: {error}") from None
    return <int>found.kind, found.row


cdef int require_alike(size_t pairs, size_t weights, size_t ids, size_t numbers, size_t low, size_t high) except -1:
    if weights != pairs or ids != numbers:
        raise ValueError(f"odd_row: rows and weights must be alike, and experts and counts; got {pairs} and "
                         f"{weights}, {ids} and {numbers}")
    if high != low:
        raise ValueError(f"odd_row: low and high must be alike, got {low} and {high}")
    return 0


cdef object odd_row_of_any(object partial, const vector[int32_t]& ids, const vector[int32_t]& numbers, object rows,
                           object weights, const double[::1] low, const double[::1] high, double least_share):
    cdef const float[:, ::1] values = np.ascontiguousarray(partial, np.float32)
    cdef const int32_t[::1] at = np.ascontiguousarray(rows, np.int32)
    cdef const float[::1] factors = np.ascontiguousarray(weights, np.float32)
    cdef size_t tokens = values.shape[0], hidden = values.shape[1], pairs = at.shape[0], n = low.shape[0]
    cdef OddRow found
    require_alike(pairs, factors.shape[0], ids.size(), numbers.size(), n, high.shape[0])
    try:
        with nogil:
            found = find_odd_row(&values[0, 0] if tokens > 0 and hidden > 0 else NULL, tokens, hidden, ids.data(),
                                 numbers.data(), ids.size(), &at[0] if pairs > 0 else NULL,
                                 &factors[0] if pairs > 0 else NULL, pairs, &low[0] if n > 0 else NULL,
                                 &high[0] if n > 0 else NULL, n, least_share)
    except ValueError as error:
        raise ValueError(f"odd_row: {error}") from None
    return <int>found.kind, found.row


def first_bad(const double[:, ::1] values not None, cbool positive):
    cdef size_t n = values.shape[0] * values.shape[1], found
    cdef double low = kSmallestPositive if positive else 0.0
    if n == 0:
        return -1
    with nogil:
        found = first_outside(&values[0, 0], n, low)
    return -1 if found == n else <Py_ssize_t>found


def top_k(const double[:, ::1] gate not None, Py_ssize_t k, const uint8_t[::1] available, cbool normalise):
    cdef size_t tokens = gate.shape[0], n_experts = gate.shape[1], bad
    if k < 1 or k > gate.shape[1]:
        raise ValueError(f"top_k must be 1 to {n_experts} (the number of experts), got {k}")
    if available is not None and available.shape[0] != gate.shape[1]:
        raise ValueError(f"available must be ({n_experts},), got ({available.shape[0]},)")
    experts = np.empty((tokens, k), np.int32)
    weights = np.empty((tokens, k))
    if tokens == 0:
        return experts, weights
    cdef int32_t[:, ::1] out_experts = experts
    cdef double[:, ::1] out_weights = weights
    cdef const uint8_t* usable = NULL
    if available is not None:
        usable = &available[0]
    with nogil:
        bad = native_top_k(&gate[0, 0], tokens, n_experts, k, usable, normalise, &out_experts[0, 0],
                           &out_weights[0, 0])
    if bad < tokens * n_experts:
        raise ValueError(f"gate must be finite and not negative, got {gate[bad // n_experts, bad % n_experts]} "
                         f"at token {bad // n_experts}, expert {bad % n_experts}")
    return experts, weights


def prune(int32_t[:, ::1] experts not None, double[:, ::1] weights not None, const double[:, ::1] latency_s not None,
          const uint8_t[::1] available, cbool cosine, cbool renormalise, cbool wlr_sum, double theta,
          double theta_step, double gamma):
    cdef size_t tokens = experts.shape[0], k = experts.shape[1], n_experts = latency_s.shape[1]
    cdef size_t stride = n_experts if latency_s.shape[0] != 1 else 0
    if weights.shape[0] != experts.shape[0] or weights.shape[1] != experts.shape[1]:
        raise ValueError(f"weights must have the shape of experts ({tokens}, {k}), "
                         f"got ({weights.shape[0]}, {weights.shape[1]})")
    if latency_s.shape[0] != 1 and latency_s.shape[0] != experts.shape[0]:
        raise ValueError(f"latency_s must have 1 or {tokens} rows, got {latency_s.shape[0]}")
    if available is not None and available.shape[0] != latency_s.shape[1]:
        raise ValueError(f"available must be ({n_experts},), got ({available.shape[0]},)")
    cdef PruneOptions options
    options.cosine, options.renormalise, options.wlr_sum = cosine, renormalise, wlr_sum
    options.theta, options.theta_step, options.gamma = theta, theta_step, gamma
    cdef PruneResult result
    dropped_weight = np.zeros(tokens)
    if tokens == 0 or k == 0 or n_experts == 0:
        return dropped_weight, 0.0, 0.0
    cdef double[::1] dropped = dropped_weight
    cdef const uint8_t* usable = NULL
    if available is not None:
        usable = &available[0]
    with nogil:
        result = native_prune(&experts[0, 0], &weights[0, 0], tokens, k, &latency_s[0, 0], stride, n_experts,
                              usable, options, &dropped[0])
    return dropped_weight, result.wlr, result.theta


cdef class Allocation:
    """Bandwidth of each device: see _native.pyi."""

    # Bands, block latencies and weights one after the other, from `at` on; in a batch all draws share one array.
    cdef object values
    cdef Py_ssize_t at, blocks, devices
    cdef readonly double latency_s, lower_bound_s, price_s_per_hz
    cdef readonly str status
    cdef readonly Py_ssize_t iterations

    @property
    def bandwidth_hz(self):
        return self.values[self.at : self.at + self.devices]

    @property
    def block_latency_s(self):
        cdef Py_ssize_t start = self.at + self.devices
        return self.values[start : start + self.blocks]

    @property
    def weight(self):
        cdef Py_ssize_t start = self.at + self.devices + self.blocks
        return self.values[start : start + self.blocks * self.devices].reshape(self.blocks, self.devices)

    def __repr__(self):
        return (f"Allocation(status={self.status!r}, latency_s={self.latency_s:.6g}, "
                f"lower_bound_s={self.lower_bound_s:.6g}, bandwidth_hz={self.bandwidth_hz})")


cdef tuple STATUS = ("optimal", "infeasible", "iteration_limit")
cdef double SMALLEST_HZ = 1e-30, LARGEST_HZ = 1e30


cdef const double* vector_of(const double[::1] values, size_t n, str name) except? NULL:
    if values is None:
        return NULL
    if <size_t>values.shape[0] != n:
        raise ValueError(f"{name} must be ({n},), one value a device, got ({values.shape[0]},)")
    return &values[0] if n > 0 else NULL


cdef const double* matrix_of(const double[:, ::1] values, size_t rows, size_t columns, str name) except? NULL:
    if values is None:
        return NULL
    if <size_t>values.shape[0] != rows or <size_t>values.shape[1] != columns:
        raise ValueError(f"{name} must be ({rows}, {columns}), got ({values.shape[0]}, {values.shape[1]})")
    return &values[0, 0] if rows * columns > 0 else NULL


cdef bint borrow(object array, Py_buffer* view) noexcept:
    """A view of C-contiguous float64, which the caller releases; False for anything else. A typed memoryview would cost
    more than solving one block does."""
    if type(array) is not NDARRAY:  # what a subclass means may not be in its buffer
        return False
    try:
        PyObject_GetBuffer(array, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
    except (TypeError, ValueError, BufferError):
        return False
    if view.itemsize == 8 and view.format != NULL and view.format[0] == c"d" and view.format[1] == 0:
        return True
    PyBuffer_Release(view)
    return False


cdef int borrow_floats(object given, str name, Py_buffer* view) except -1:
    """As `borrow`, after converting what needs it. The view keeps the array alive."""
    if not borrow(given, view) and not borrow(floats(name, given), view):
        raise ValueError(f"{name} cannot be read as float64")
    return 0


def regular(str name not None, given):
    """See _native.pyi."""
    unmasked(name, given)
    try:
        return np.asarray(given)
    except ValueError:  # rows of different lengths
        raise ValueError(f"{name} must be a regular array of numbers") from None


def floats(str name not None, given):
    """See _native.pyi."""
    array = regular(name, given)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers, got {array.dtype}")
    return np.asarray(array, np.float64, order="C")


cdef int check_loads(const double* load, size_t draws, size_t blocks, size_t devices) except -1:
    cdef size_t size = blocks * devices, bad
    with nogil:
        bad = first_outside(load, draws * size, 0.0)
    if bad == draws * size:
        return 0
    where = f"block {bad % size // devices}, device {bad % devices}"
    if draws > 1:
        where = f"draw {bad // size}, {where}"
    raise ValueError(f"load must be finite and not negative, got {load[bad]} at {where}")


cdef BandwidthTask task_of(size_t blocks, size_t devices, cbool flat, double total_hz, const double[:, ::1] fixed_s,
                           const double[::1] floor_hz, const double[::1] cap_hz, double tolerance,
                           Py_ssize_t limit) except *:
    """A task but for load, links and start."""
    if not SMALLEST_HZ <= total_hz <= LARGEST_HZ:  # also refuses NaN
        raise ValueError(f"total_hz must be within {SMALLEST_HZ:g} to {LARGEST_HZ:g}, got {total_hz}")
    if not 1e-11 <= tolerance <= 1:
        raise ValueError(f"tolerance must be 1e-11 to 1, got {tolerance}")
    if limit < 1:
        raise ValueError(f"iterations must be at least 1, got {limit}")
    if blocks * devices == 0:
        raise ValueError(f"load must have at least one block and one device, got ({blocks}, {devices})")
    cdef BandwidthTask task
    task.blocks, task.devices, task.flat = blocks, devices, flat
    task.total_hz, task.tolerance, task.limit = total_hz, tolerance, limit
    task.fixed = matrix_of(fixed_s, blocks, devices, "fixed_s")
    task.floor_hz = vector_of(floor_hz, devices, "floor_hz")
    task.cap_hz = vector_of(cap_hz, devices, "cap_hz")
    task.start_hz = NULL
    task.start_weight = NULL
    return task


cdef BandwidthArrays arrays_of(double* values, const BandwidthTask& task) noexcept nogil:
    cdef BandwidthArrays out
    out.band_hz = values
    out.block_latency = values + task.devices
    out.weight = out.block_latency + task.blocks
    return out


cdef Allocation allocation_of(object values, Py_ssize_t at, const BandwidthTask& task, const BandwidthAnswer& answer):
    cdef Allocation result = Allocation.__new__(Allocation)
    result.values, result.at, result.blocks, result.devices = values, at, task.blocks, task.devices
    result.latency_s, result.lower_bound_s = answer.latency, answer.lower_bound
    result.price_s_per_hz, result.status, result.iterations = answer.price, STATUS[answer.status], answer.iterations
    return result


def allocate(load not None, links not None, cbool flat, double total_hz, const double[:, ::1] fixed_s=None,
             const double[::1] floor_hz=None, const double[::1] cap_hz=None, const double[::1] start_hz=None,
             const double[:, ::1] start_weight=None, double tolerance=1e-8, Py_ssize_t limit=150):
    cdef Py_buffer loads, table
    cdef BandwidthTask task
    cdef BandwidthAnswer answer
    cdef BandwidthArrays out
    borrow_floats(load, "load", &loads)
    try:
        borrow_floats(links, "links", &table)
        try:
            if loads.ndim != 1 and loads.ndim != 2:
                raise ValueError(f"load must be (blocks, devices) or (devices,), got shape {np.shape(load)}")
            if table.ndim != 2 or table.shape[0] != 5:
                raise ValueError(f"links must be (devices,), got shape {links[..., 0, :].shape}")
            if loads.shape[loads.ndim - 1] != table.shape[1]:
                raise ValueError(f"load must have one column for each of the {table.shape[1]} links, "
                                 f"got {loads.shape[loads.ndim - 1]}")
            task = task_of(loads.shape[0] if loads.ndim == 2 else 1, table.shape[1], flat, total_hz, fixed_s, floor_hz,
                           cap_hz, tolerance, limit)
            task.load = <const double*>loads.buf
            task.links = <const double*>table.buf
            check_loads(task.load, 1, task.blocks, task.devices)
            task.start_hz = vector_of(start_hz, task.devices, "start")
            task.start_weight = matrix_of(start_weight, task.blocks, task.devices, "start")
            values = empty(task.devices + task.blocks + task.blocks * task.devices)
            out = arrays_of(<double*>data_of(values), task)
            with nogil:
                answer = solve_bandwidth(task, out)
            return allocation_of(values, 0, task, answer)
        finally:
            PyBuffer_Release(&table)
    finally:
        PyBuffer_Release(&loads)


def allocate_many(const double[:, :, ::1] load not None, const double[:, :, ::1] links not None, cbool flat,
                  double total_hz, const double[:, ::1] fixed_s=None, const double[::1] floor_hz=None,
                  const double[::1] cap_hz=None, cbool warm=False, double tolerance=1e-8, Py_ssize_t limit=150):
    cdef size_t draws = links.shape[0], blocks = load.shape[1], devices = load.shape[2], k
    cdef size_t step = blocks * devices if load.shape[0] != 1 else 0
    if load.shape[0] != 1 and load.shape[0] != links.shape[0]:
        raise ValueError(f"load must have one entry for each of the {draws} draws, got {load.shape[0]}")
    if links.shape[1] != 5 or links.shape[2] != load.shape[2]:
        raise ValueError(f"load must have one column for each of the {links.shape[2]} links, got {devices}")
    cdef BandwidthTask task = task_of(blocks, devices, flat, total_hz, fixed_s, floor_hz, cap_hz, tolerance, limit)
    if draws == 0:
        return []
    check_loads(&load[0, 0, 0], load.shape[0], blocks, devices)
    cdef size_t each = devices + blocks + blocks * devices
    values = empty(draws * each)
    cdef double* first = <double*>data_of(values)
    cdef BandwidthArrays out
    cdef vector[BandwidthAnswer] answers
    answers.resize(draws)
    with nogil:
        for k in range(draws):
            task.load, task.links = &load[0, 0, 0] + k * step, &links[k, 0, 0]
            out = arrays_of(first + k * each, task)
            answers[k] = solve_bandwidth(task, out)
            task.start_hz = out.band_hz if warm and answers[k].status != 1 else NULL
            task.start_weight = out.weight if task.start_hz != NULL else NULL
    return [allocation_of(values, k * each, task, answers[k]) for k in range(draws)]


def resolve(const int32_t[:, ::1] experts not None, const double[:, ::1] weights not None,
            const int32_t[:, ::1] device_of not None, cbool by_expert, Py_ssize_t devices):
    cdef size_t n = experts.shape[0] * experts.shape[1], bad = 0
    cdef size_t n_experts = device_of.shape[1] if by_expert else 0, top_k = experts.shape[1]
    if weights.shape[0] != experts.shape[0] or weights.shape[1] != experts.shape[1]:
        raise ValueError(f"weights must have the shape of experts ({experts.shape[0]}, {experts.shape[1]}), "
                         f"got ({weights.shape[0]}, {weights.shape[1]})")
    if by_expert and (device_of.shape[0] != 1 or n_experts == 0):
        raise ValueError(f"device_of must have at least one expert, got ({device_of.shape[1]},)")
    if not by_expert and (device_of.shape[0] != experts.shape[0] or device_of.shape[1] != experts.shape[1]):
        raise ValueError(f"device_of must be (experts,) or the shape of experts ({experts.shape[0]}, "
                         f"{experts.shape[1]}), got ({device_of.shape[0]}, {device_of.shape[1]})")
    if n > 0xFFFFFFFF:
        raise ValueError(f"experts must have fewer than 2**32 entries, got {n}")
    device = empty((experts.shape[0], experts.shape[1]), INT32)
    weight = empty((experts.shape[0], experts.shape[1]))
    if n == 0:
        return device, weight
    cdef int32_t[:, ::1] out_device = device
    cdef double[:, ::1] out_weight = weight
    with nogil:
        bad = first_outside(&weights[0, 0], n, 0.0)
    if bad < n:
        raise ValueError(f"weights must be finite and not negative, got {weights[bad // top_k, bad % top_k]} "
                         f"at token {bad // top_k}")
    with nogil:
        native_resolve(&experts[0, 0], &weights[0, 0], n, &device_of[0, 0], n_experts, devices, &out_device[0, 0],
                       &out_weight[0, 0])
    return device, weight


def keep_marked(int32_t[:, ::1] experts not None, double[:, ::1] weights not None, const uint8_t[:, ::1] kept not None,
                cbool renormalise):
    cdef size_t tokens = experts.shape[0], k = experts.shape[1]
    if (weights.shape[0] != experts.shape[0] or weights.shape[1] != experts.shape[1]
            or kept.shape[0] != experts.shape[0] or kept.shape[1] != experts.shape[1]):
        raise ValueError(f"weights and kept must have the shape of experts ({tokens}, {k})")
    dropped_weight = np.zeros(tokens)
    cdef double total = 0.0
    cdef double[::1] dropped = dropped_weight
    if tokens * k > 0:
        with nogil:
            total = native_keep_marked(&experts[0, 0], &weights[0, 0], tokens, k, &kept[0, 0], renormalise, &dropped[0])
    return dropped_weight, total


def needed_hz(const double[:, ::1] links not None, cbool flat, const double[::1] token_s not None):
    cdef size_t devices = links.shape[1], n = token_s.shape[0]
    check_links(links)
    hertz = empty((devices, n))
    cdef double[:, ::1] out = hertz
    if devices * n > 0:
        with nogil:
            native_needed_hz(&links[0, 0], devices, flat, &token_s[0], n, &out[0, 0])
    return hertz


cdef Assignments assignments_of(const int32_t[:, ::1] device, const double[:, ::1] weights, size_t devices) except *:
    """Devices must be below `devices`: that is `resolve`'s to check."""
    if weights.shape[0] != device.shape[0] or weights.shape[1] != device.shape[1]:
        raise ValueError(f"weights must have the shape of device ({device.shape[0]}, {device.shape[1]}), "
                         f"got ({weights.shape[0]}, {weights.shape[1]})")
    cdef Assignments given
    cdef size_t size = device.shape[0] * device.shape[1]
    given.tokens, given.top_k, given.devices = device.shape[0], device.shape[1], devices
    given.device = &device[0, 0] if size > 0 else NULL
    given.weight = &weights[0, 0] if size > 0 else NULL
    return given


def shed_bottleneck(const int32_t[:, ::1] device not None, const double[:, ::1] weights not None,
                    const double[::1] token_s not None, double light):
    cdef Assignments given = assignments_of(device, weights, token_s.shape[0])
    kept = empty((given.tokens, given.top_k), np.uint8)
    cdef uint8_t[:, ::1] out = kept
    if given.tokens * given.top_k > 0:
        with nogil:
            native_shed_bottleneck(given, &token_s[0], light, &out[0, 0])
    return kept


cdef int check_links(const double[:, ::1] links) except -1:
    if links.shape[0] != 5:
        raise ValueError(f"links must be (5, devices), got ({links.shape[0]}, {links.shape[1]})")
    return 0


def choose_within_budget(const int32_t[:, ::1] device not None, const double[:, ::1] weights not None,
                         const double[:, ::1] links not None, cbool flat, double total_hz, double budget_s):
    cdef Assignments given = assignments_of(device, weights, links.shape[1])
    cdef BudgetAnswer answer
    check_links(links)
    kept = empty((given.tokens, given.top_k), np.uint8)
    cdef uint8_t[:, ::1] out = kept
    if given.tokens * given.top_k == 0:
        return kept, 0.0, True
    with nogil:
        answer = native_choose_within_budget(given, &links[0, 0], flat, total_hz, budget_s, &out[0, 0])
    return kept, answer.upper_bound, answer.fits


def choose_least_budget(const int32_t[:, ::1] device not None, const double[:, ::1] weights not None,
                        const double[:, ::1] links not None, cbool flat, double total_hz, double goal, double most_s):
    cdef Assignments given = assignments_of(device, weights, links.shape[1])
    cdef BudgetAnswer answer
    check_links(links)
    kept = empty((given.tokens, given.top_k), np.uint8)
    cdef uint8_t[:, ::1] out = kept
    if given.tokens * given.top_k == 0:
        return kept, 0.0, 0.0
    with nogil:
        answer = native_choose_least_budget(given, &links[0, 0], flat, total_hz, goal, most_s, &out[0, 0])
    return kept, answer.upper_bound, answer.lower_bound_s


def choose_copies(const int32_t[:, ::1] experts not None, const uint8_t[:, ::1] holders not None,
                  const double[::1] token_s not None, const double[::1] busy_s=None):
    cdef CopyTask task
    task.tokens, task.top_k = experts.shape[0], experts.shape[1]
    task.n_experts, task.devices = holders.shape[0], holders.shape[1]
    if token_s.shape[0] != holders.shape[1] or task.n_experts * task.devices == 0:
        raise ValueError(f"holders must be (experts, {token_s.shape[0]}), not empty, "
                         f"got ({holders.shape[0]}, {holders.shape[1]})")
    device = empty((task.tokens, task.top_k), INT32)
    if task.tokens * task.top_k == 0:
        return device
    cdef int32_t[:, ::1] out = device
    task.experts, task.holders, task.token_s = &experts[0, 0], &holders[0, 0], &token_s[0]
    task.busy_s = vector_of(busy_s, task.devices, "busy_s")
    cdef CopyChooser* chooser = NULL
    try:
        with nogil:
            chooser = new CopyChooser(task)
            chooser.choose(&out[0, 0])
    finally:
        del chooser
    return device


def replace_far(int32_t[:, ::1] experts not None, const double[:, ::1] weights not None,
                const double[:, ::1] similarity not None, const double[::1] seconds not None,
                double least_similarity, double times_faster, double most_share):
    cdef ReplaceTask task
    task.tokens, task.top_k, task.n_experts = experts.shape[0], experts.shape[1], seconds.shape[0]
    task.weight = matrix_of(weights, task.tokens, task.top_k, "weights")
    task.similarity = matrix_of(similarity, task.n_experts, task.n_experts, "similarity")
    task.least_similarity, task.times_faster, task.most_share = least_similarity, times_faster, most_share
    if task.tokens * task.top_k == 0 or task.n_experts == 0:
        return
    task.seconds = &seconds[0]
    with nogil:
        native_replace_far(task, &experts[0, 0])
