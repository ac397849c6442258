"""Sixteen float32 lanes as a numba type, so that kernels fix the order of every sum.

LLVM's vectoriser may sum the body of a loop in one order and its tail in another. Here each
operation is one explicit vector instruction, none is fast-math, and rows are padded to whole
vectors: the result of a row does not depend on its place in a batch.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
BYTES = I8.as_pointer()
F32X16 = ir.VectorType(F32, LANES)
I16X16 = ir.VectorType(I16, LANES)
I32X16 = ir.VectorType(I32, LANES)
UPPER = 0xFFFF0000  # the half of a 32-bit word that holds the odd bfloat16
ALIGNMENT = {I16X16: 2, I64: 8}  # bytes; of all other types 4

Builder = ir.IRBuilder
Emitted = Any  # an LLVM value under construction


class Float32x16(types.Type):
    """The numba type of one vector."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


float32x16 = Float32x16()


@register_model(Float32x16)
class Float32x16Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, F32X16)


# --- building blocks of instructions -------------------------------------------------------------


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def splat(b: Builder, scalar: Emitted, lanes: int = LANES) -> Emitted:
    """A vector with the scalar in every lane."""
    kind = ir.VectorType(scalar.type, lanes)
    nothing = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def lanes_of(value: float, kind: ir.VectorType = F32X16) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def offset(b: Builder, pointer: Emitted, num_bytes: Emitted) -> Emitted:
    return b.gep(pointer, [num_bytes])


def read(b: Builder, pointer: Emitted, kind: ir.Type) -> Emitted:
    """Load, assuming the alignment of one element only."""
    return b.load(b.bitcast(pointer, kind.as_pointer()), align=ALIGNMENT.get(kind, 4))


def write(b: Builder, value: Emitted, pointer: Emitted) -> None:
    align = ALIGNMENT.get(value.type, 4)
    b.store(value, b.bitcast(pointer, value.type.as_pointer()), align=align)


def external(b: Builder, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
    """Declare a function of LLVM or of the C library."""
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


def fused(b: Builder, x: Emitted, y: Emitted, z: Emitted) -> Emitted:
    """x * y + z, rounded once."""
    return b.call(external(b, "llvm.fma.v16f32", F32X16, F32X16, F32X16, F32X16), [x, y, z])


def element_pointer(context: Any, b: Builder, array: types.Array, value: Any, at: Any) -> Emitted:
    """Address of element `at` of an array argument."""
    data = b.bitcast(cgutils.create_struct_proxy(array)(context, b, value).data, BYTES)
    return offset(b, data, b.mul(at, i64(array.dtype.bitwidth // 8)))


def holds_bfloat16(array: types.Array) -> bool:
    """True if an array holds the bits of bfloat16; else its elements are float32 in memory."""
    assert array.dtype in (types.uint16, types.uint32, types.float32), array
    return array.dtype == types.uint16


def widened(b: Builder, halves: Emitted) -> Emitted:
    """bfloat16 bits to float32: exact."""
    bits = b.shl(b.zext(halves, I32X16), lanes_of(16, I32X16))
    return b.bitcast(bits, F32X16)


def rounded(b: Builder, wide: Emitted) -> Emitted:
    """float32 to bfloat16 bits, to nearest, ties to even, as in torch."""
    bits, sixteen = b.bitcast(wide, I32X16), lanes_of(16, I32X16)
    odd = b.and_(b.lshr(bits, sixteen), lanes_of(1, I32X16))
    return b.trunc(b.lshr(b.add(b.add(bits, lanes_of(0x7FFF, I32X16)), odd), sixteen), I16X16)


def stored(b: Builder, lanes: Emitted, array: types.Array) -> Emitted:
    """float32 lanes in the number type of an array."""
    if holds_bfloat16(array):
        return rounded(b, lanes)
    if array.dtype == types.uint32:
        return b.shl(b.zext(rounded(b, lanes), I32X16), lanes_of(16, I32X16))
    return lanes


def prefetch_line(b: Builder, pointer: Emitted) -> None:
    """Prefetch a cache line into the second-level cache; any address is safe."""
    fetch = external(b, "llvm.prefetch.p0", ir.VoidType(), BYTES, I32, I32, I32)
    b.call(fetch, [pointer, *(ir.Constant(I32, flag) for flag in (0, 2, 1))])  # read, L2, data


# --- arithmetic ----------------------------------------------------------------------------------

for symbol, instruction in {
    operator.add: "fadd",
    operator.sub: "fsub",
    operator.mul: "fmul",
    operator.truediv: "fdiv",
}.items():

    @infer_global(symbol)
    class LaneByLane(ConcreteTemplate):
        cases = [signature(float32x16, float32x16, float32x16)]  # noqa: RUF012

    @lower_builtin(symbol, float32x16, float32x16)
    def emit_lane_by_lane(context, b, sig, args, instruction=instruction):
        return getattr(b, instruction)(*args)


@intrinsic
def fill(typing, scalar):
    """The float32 scalar in all lanes."""

    def emit(context, b, sig, args):
        return splat(b, args[0])

    return float32x16(types.float32), emit


@intrinsic
def fma(typing, x, y, z):
    """x * y + z, rounded once."""

    def emit(context, b, sig, args):
        return fused(b, *args)

    return float32x16(float32x16, float32x16, float32x16), emit


@intrinsic
def larger(typing, x, y):
    """The larger of two, lane by lane."""

    def emit(context, b, sig, args):
        return b.select(b.fcmp_ordered(">", *args), *args)

    return float32x16(float32x16, float32x16), emit


@intrinsic
def inside(typing, lanes, first, low, high, other):
    """Lane i if low <= first + i <= high, else the float32 `other`."""

    def emit(context, b, sig, args):
        lanes, first, low, high, other = args
        steps = ir.Constant(I32X16, list(range(LANES)))
        at = b.add(splat(b, b.trunc(first, I32)), steps)
        above = b.icmp_signed(">=", at, splat(b, b.trunc(low, I32)))
        below = b.icmp_signed("<=", at, splat(b, b.trunc(high, I32)))
        return b.select(b.and_(above, below), lanes, splat(b, other))

    index = types.int64
    return float32x16(float32x16, index, index, index, types.float32), emit


def _folded(b: Builder, lanes: Emitted, combine: Any) -> Emitted:
    """All lanes combined, one half with the other: always the same tree."""
    width = LANES
    while width > 1:
        width //= 2
        order = ir.Constant(ir.VectorType(I32, LANES), [(i + width) % LANES for i in range(LANES)])
        lanes = combine(lanes, b.shuffle_vector(lanes, lanes, order))
    return b.extract_element(lanes, ir.Constant(I32, 0))


@intrinsic
def total(typing, lanes):
    """Sum of the lanes, always added in the same order."""

    def emit(context, b, sig, args):
        return _folded(b, args[0], b.fadd)

    return types.float32(float32x16), emit


@intrinsic
def largest(typing, lanes):
    """Largest lane."""

    def emit(context, b, sig, args):
        return _folded(b, args[0], lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))

    return types.float32(float32x16), emit


# 2**x on [-1/2, 1/2]: minimax in float32, relative error 1e-7.
EXP2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)


@intrinsic
def exp2(typing, lanes):
    """2**x lane by lane, for x up to 127; exactly 0 for x < -126."""

    def emit(context, b, sig, args):
        x, bottom = args[0], lanes_of(-126.0)
        tiny = b.fcmp_ordered("<", x, bottom)
        x = b.select(tiny, bottom, x)
        whole = b.call(external(b, "llvm.rint.v16f32", F32X16, F32X16), [x])
        rest = b.fsub(x, whole)
        value = lanes_of(EXP2[0])
        for coefficient in EXP2[1:]:
            value = fused(b, value, rest, lanes_of(coefficient))
        exponent = b.shl(b.fptosi(whole, I32X16), lanes_of(23, I32X16))
        scaled = b.add(b.bitcast(value, I32X16), exponent)
        return b.bitcast(b.select(tiny, lanes_of(0, I32X16), scaled), F32X16)

    return float32x16(float32x16), emit
