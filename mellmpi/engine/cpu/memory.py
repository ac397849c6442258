"""Loads and stores of vectors of sixteen lanes.

Arrays are 1-D: float32; uint16 that hold the bits of bfloat16; or uint32 that hold bfloat16 numbers
as float32, for a CPU that cannot multiply bfloat16.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mellmpi.engine.cpu.vectors import (
    F32,
    F32X16,
    I16,
    I16X16,
    I32,
    I32X16,
    LANES,
    UPPER,
    element_pointer,
    float32x16,
    holds_bfloat16,
    i64,
    lanes_of,
    offset,
    read,
    rounded,
    stored,
    widened,
    write,
)


@intrinsic
def load(typing, array, at):
    """array[at : at + 16] as float32 lanes."""

    def emit(context, b, sig, args):
        pointer = element_pointer(context, b, sig.args[0], *args)
        if holds_bfloat16(array):
            return widened(b, read(b, pointer, I16X16))
        return read(b, pointer, F32X16)

    return float32x16(array, types.int64), emit


@intrinsic
def store(typing, array, at, lanes):
    """array[at : at + 16] = lanes, rounded to the type of the array's numbers."""

    def emit(context, b, sig, args):
        pointer = element_pointer(context, b, sig.args[0], *args[:2])
        write(b, stored(b, args[2], array), pointer)
        return context.get_dummy_value()

    return types.void(array, types.int64, float32x16), emit


@intrinsic
def element(typing, array, at):
    """array[at] as float32."""

    def emit(context, b, sig, args):
        pointer = element_pointer(context, b, sig.args[0], *args)
        if not holds_bfloat16(array):
            return b.load(b.bitcast(pointer, F32.as_pointer()))
        half = b.load(b.bitcast(pointer, I16.as_pointer()))
        return b.bitcast(b.shl(b.zext(half, I32), ir.Constant(I32, 16)), F32)

    return types.float32(array, types.int64), emit


def _half(is_odd: bool) -> Any:
    """The even or odd halves of 16 words from array[at] on, as float32; for bfloat16 only."""

    @intrinsic
    def half(typing, array, at):
        def emit(context, b, sig, args):
            words = read(b, element_pointer(context, b, sig.args[0], *args), I32X16)
            words = (b.and_ if is_odd else b.shl)(words, lanes_of(UPPER if is_odd else 16, I32X16))
            return b.bitcast(words, F32X16)

        return float32x16(array, types.int64), emit

    return half


even, odd = _half(False), _half(True)


@intrinsic
def pair_of(typing, array):
    """Elements in a 32-bit word: 2 of bfloat16, 1 of float32. LLVM sees a constant."""

    def emit(context, b, sig, args):
        return i64(2 if holds_bfloat16(array) else 1)

    return types.int64(array), emit


@intrinsic
def store_words(typing, array, at, stride, lanes):
    """Store the lanes in the array's number type, as 32-bit words `stride` elements apart."""

    def emit(context, b, sig, args):
        pointer = element_pointer(context, b, sig.args[0], *args[:2])
        step, words = b.mul(args[2], i64(array.dtype.bitwidth // 8)), args[3]
        if holds_bfloat16(array):
            words = b.bitcast(rounded(b, words), ir.VectorType(I32, LANES // 2))
        for lane in range(words.type.count):
            write(b, b.extract_element(words, ir.Constant(I32, lane)), pointer)
            pointer = offset(b, pointer, step)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, float32x16), emit


@intrinsic
def store_pairs(typing, array, at, even, odd):
    """Store 16 words from array[at] on, each of an even and an odd lane; for bfloat16 only."""

    def emit(context, b, sig, args):
        if not holds_bfloat16(array):
            return context.get_dummy_value()
        halves = [b.zext(rounded(b, lanes), I32X16) for lanes in args[2:]]
        words = b.or_(halves[0], b.shl(halves[1], lanes_of(16, I32X16)))
        write(b, words, element_pointer(context, b, sig.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.int64, float32x16, float32x16), emit


@intrinsic
def store_odd(typing, array, at, odd):
    """Store the odd halves of 16 words from array[at] on; for bfloat16 only. Not atomic."""

    def emit(context, b, sig, args):
        if not holds_bfloat16(array):
            return context.get_dummy_value()
        pointer = element_pointer(context, b, sig.args[0], *args[:2])
        even = b.and_(read(b, pointer, I32X16), lanes_of(0xFFFF, I32X16))
        odd = b.shl(b.zext(rounded(b, args[2]), I32X16), lanes_of(16, I32X16))
        write(b, b.or_(even, odd), pointer)
        return context.get_dummy_value()

    return types.void(array, types.int64, float32x16), emit
