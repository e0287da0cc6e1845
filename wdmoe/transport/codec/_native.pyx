# cython: language_level=3, embedsignature=False, freethreading_compatible=False
"""Thin bridge to native/wdmoe/layer_frames.hpp: takes messages apart, and puts them together. Types: _native.pyi.

None stands for "not as expected": whatever is unusual is the general codec's to judge.
"""

import sys

import numpy as np

from wdmoe.transport.codec.messages import Result, Run

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject_GenericSetAttr
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool


cdef extern from "wdmoe/layer_frames.hpp" namespace "wdmoe" nogil:
    const size_t kMostExperts
    const uint64_t kIndexEnd

    cdef cppclass FrameTensor:
        cbool half
        size_t at, bytes

    cdef cppclass OrderFrame:
        uint64_t attempt
        uint32_t layer
        double remaining_s, bandwidth_hz
        size_t experts
        uint32_t* expert
        uint32_t* count
        size_t token_count, hidden, pairs
        FrameTensor tokens, rows, weights

    cdef cppclass AnswerFrame:
        uint64_t attempt
        uint32_t layer
        double compute_s, residence_s, link_down_s, link_up_s
        size_t token_count, hidden
        FrameTensor partial

    cdef cppclass MapWriter "wdmoe::frames::MapWriter":
        pass

    cbool agrees(const OrderFrame& order, const int32_t* rows) noexcept
    cbool read_order(const uint8_t* frame, size_t size, OrderFrame& order) noexcept
    cbool read_answer(const uint8_t* frame, size_t size, AnswerFrame& answer) noexcept
    size_t plan_order(OrderFrame& order, MapWriter& map) noexcept
    size_t plan_answer(AnswerFrame& answer, MapWriter& map) noexcept
    void write_order(OrderFrame& order, const MapWriter& map, uint8_t version, const void* tokens, const void* rows,
                     const void* weights, uint8_t* frame) noexcept
    void write_answer(AnswerFrame& answer, const MapWriter& map, uint8_t version, const void* partial,
                      uint8_t* frame) noexcept


cdef object empty = np.empty
cdef object NDARRAY = np.ndarray
cdef object FLOAT32 = np.dtype(np.float32)
cdef object FLOAT16 = np.dtype(np.float16)
cdef object INT32 = np.dtype(np.int32)
cdef object new = object.__new__
cdef object RUN = Run
cdef object RESULT = Result
cdef bint USABLE = sys.byteorder == "little"  # tensors travel as they lie in memory
cdef size_t VIEW_FROM_BYTES = 32768  # a tensor as large is not copied, but looked at in its frame


cdef class _Tensor:
    """A C-contiguous array's memory, held as long as this lives."""

    cdef Py_buffer view
    cdef bint held

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef _Tensor tensor_of(object array, int dimensions, char first, char second):
    """None where it is no plain array of so many dimensions and of one of two formats."""
    if type(array) is not NDARRAY:
        return None
    cdef _Tensor tensor = _Tensor.__new__(_Tensor)
    try:
        PyObject_GetBuffer(array, &tensor.view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
    except ValueError:  # not contiguous
        return None
    tensor.held = True
    cdef const char* format = tensor.view.format
    if tensor.view.ndim != dimensions or format[1] != 0 or (format[0] != first and format[0] != second):
        return None
    return tensor


cdef bint whole(object value, uint64_t end, uint64_t* out) except -1:
    """A Python integer from 0 to below `end` (0: 2**64)."""
    if type(value) is not int:
        return False
    try:
        out[0] = value
    except OverflowError:
        return False
    return end == 0 or out[0] < end


cdef bint amount(object value, double* out) except -1:
    """A finite Python float, zero or more."""
    if type(value) is not float:
        return False
    out[0] = value
    return out[0] >= 0 and out[0] <= 1.7976931348623157e308


cdef bint numbers(object values, uint32_t* out, size_t* count) except -1:
    """A tuple of 1 to kMostExperts indices."""
    if type(values) is not tuple or not 0 < len(values) <= <Py_ssize_t>kMostExperts:
        return False
    cdef uint64_t value
    cdef size_t at = 0
    for each in values:
        if not whole(each, kIndexEnd, &value):
            return False
        out[at] = <uint32_t>value
        at += 1
    count[0] = at
    return True


def write(object message, int version):
    cdef object kind = type(message)
    if not USABLE:
        return None
    if kind is RUN:
        return write_run(message, <uint8_t>version)
    if kind is RESULT:
        return write_result(message, <uint8_t>version)
    return None


cdef object write_run(object run, uint8_t version):
    cdef OrderFrame order
    cdef MapWriter map
    cdef uint64_t layer
    cdef size_t counts
    if not whole(run.attempt, 0, &order.attempt) or not whole(run.layer, kIndexEnd, &layer):
        return None
    if not amount(run.remaining_s, &order.remaining_s) or not amount(run.bandwidth_hz, &order.bandwidth_hz):
        return None
    if not numbers(run.experts, order.expert, &order.experts) or not numbers(run.counts, order.count, &counts):
        return None
    cdef _Tensor tokens = tensor_of(run.tokens, 2, c"f", c"e")
    cdef _Tensor rows = tensor_of(run.rows, 1, c"i", c"i")
    cdef _Tensor weights = tensor_of(run.weights, 1, c"f", c"f")
    if tokens is None or rows is None or weights is None or counts != order.experts:
        return None
    if rows.view.shape[0] != weights.view.shape[0] or tokens.view.len == 0:
        return None
    order.layer = <uint32_t>layer
    order.token_count, order.hidden, order.pairs = tokens.view.shape[0], tokens.view.shape[1], rows.view.shape[0]
    if order.token_count >= kIndexEnd or order.hidden >= kIndexEnd or not agrees(order, <const int32_t*>rows.view.buf):
        return None
    order.tokens.half = tokens.view.itemsize == 2
    order.tokens.bytes, order.rows.bytes, order.weights.bytes = tokens.view.len, rows.view.len, weights.view.len
    if order.tokens.bytes > 0xFFFFFFFF or order.rows.bytes > 0xFFFFFFFF:
        return None
    cdef size_t size = plan_order(order, map)
    if size == 0:
        return None
    cdef bytes frame = PyBytes_FromStringAndSize(NULL, size)
    write_order(order, map, version, tokens.view.buf, rows.view.buf, weights.view.buf,
                <uint8_t*>PyBytes_AS_STRING(frame))
    return frame


cdef object write_result(object result, uint8_t version):
    cdef AnswerFrame answer
    cdef MapWriter map
    cdef uint64_t layer
    if not whole(result.attempt, 0, &answer.attempt) or not whole(result.layer, kIndexEnd, &layer):
        return None
    if not amount(result.compute_s, &answer.compute_s) or not amount(result.residence_s, &answer.residence_s):
        return None
    if not amount(result.link_down_s, &answer.link_down_s) or not amount(result.link_up_s, &answer.link_up_s):
        return None
    cdef _Tensor partial = tensor_of(result.partial, 2, c"f", c"e")
    if partial is None or partial.view.len == 0 or <size_t>partial.view.len > 0xFFFFFFFF:
        return None
    answer.layer = <uint32_t>layer
    answer.token_count, answer.hidden = partial.view.shape[0], partial.view.shape[1]
    if answer.token_count >= kIndexEnd or answer.hidden >= kIndexEnd:
        return None
    answer.partial.half = partial.view.itemsize == 2
    answer.partial.bytes = partial.view.len
    cdef size_t size = plan_answer(answer, map)
    if size == 0:
        return None
    cdef bytes frame = PyBytes_FromStringAndSize(NULL, size)
    write_answer(answer, map, version, partial.view.buf, <uint8_t*>PyBytes_AS_STRING(frame))
    return frame


def read(object frame, int version):
    cdef Py_buffer view
    if not USABLE:
        return None
    PyObject_GetBuffer(frame, &view, PyBUF_SIMPLE)
    cdef const uint8_t* data = <const uint8_t*>view.buf
    try:
        if view.len < 4 or data[0] != version:
            return None
        if data[1] == 18:
            return read_run(frame, data, view.len)
        if data[1] == 19:
            return read_result(frame, data, view.len)
        return None
    finally:
        PyBuffer_Release(&view)


cdef object array_of(object frame, const uint8_t* data, const FrameTensor& tensor, object shape, object dtype):
    """A copy; of a large aligned one a view of the frame."""
    cdef const uint8_t* start = data + tensor.at
    if tensor.bytes >= VIEW_FROM_BYTES and (<size_t>start) % 8 == 0:
        return NDARRAY(shape, dtype, frame, tensor.at)
    cdef object array = empty(shape, dtype)
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_SIMPLE)
    memcpy(view.buf, start, tensor.bytes)
    PyBuffer_Release(&view)
    return array


cdef tuple tuple_of(const uint32_t* values, size_t n):
    return tuple([values[i] for i in range(n)])


cdef object read_run(object frame, const uint8_t* data, size_t size):
    cdef OrderFrame order
    if not read_order(data, size, order):
        return None
    cdef object rows = array_of(frame, data, order.rows, order.pairs, INT32)
    cdef Py_buffer view
    PyObject_GetBuffer(rows, &view, PyBUF_SIMPLE)  # aligned, where the frame's own bytes need not be
    cdef cbool agreed = agrees(order, <const int32_t*>view.buf)
    PyBuffer_Release(&view)
    if not agreed:
        return None
    cdef object run = new(RUN)
    PyObject_GenericSetAttr(run, "attempt", order.attempt)  # as a frozen dataclass does it
    PyObject_GenericSetAttr(run, "layer", order.layer)
    PyObject_GenericSetAttr(run, "remaining_s", order.remaining_s)
    PyObject_GenericSetAttr(run, "experts", tuple_of(order.expert, order.experts))
    PyObject_GenericSetAttr(run, "counts", tuple_of(order.count, order.experts))
    cdef object dtype = FLOAT16 if order.tokens.half else FLOAT32
    tokens = array_of(frame, data, order.tokens, (order.token_count, order.hidden), dtype)
    PyObject_GenericSetAttr(run, "tokens", tokens)
    PyObject_GenericSetAttr(run, "rows", rows)
    PyObject_GenericSetAttr(run, "weights", array_of(frame, data, order.weights, order.pairs, FLOAT32))
    PyObject_GenericSetAttr(run, "bandwidth_hz", order.bandwidth_hz)
    return run


cdef object read_result(object frame, const uint8_t* data, size_t size):
    cdef AnswerFrame answer
    if not read_answer(data, size, answer):
        return None
    cdef object result = new(RESULT)
    PyObject_GenericSetAttr(result, "attempt", answer.attempt)
    PyObject_GenericSetAttr(result, "layer", answer.layer)
    PyObject_GenericSetAttr(result, "compute_s", answer.compute_s)
    PyObject_GenericSetAttr(result, "residence_s", answer.residence_s)
    PyObject_GenericSetAttr(result, "link_down_s", answer.link_down_s)
    PyObject_GenericSetAttr(result, "link_up_s", answer.link_up_s)
    cdef object dtype = FLOAT16 if answer.partial.half else FLOAT32
    partial = array_of(frame, data, answer.partial, (answer.token_count, answer.hidden), dtype)
    PyObject_GenericSetAttr(result, "partial", partial)
    return result
