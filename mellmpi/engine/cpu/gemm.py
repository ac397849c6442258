"""GEMM micro-kernels: a few rows times a micro-panel of columns, accumulated in registers.

Every output element is one SIMD lane of one accumulator, and the lane adds its products in the
order of k. So an element has the same bits for any number of rows, and a token does not depend on
its batch.

A micro-panel stores, for each step of k, the columns side by side. A step is one float32 a column,
or two bfloat16 (k, k + 1), which AVX512-BF16 multiplies in one instruction:

    float32   w[step][column]            a[row][step]
    bfloat16  w[step][column][2]         a[row][step][2]
    mixed     w[step][column][2]         a[row][step][2], each a float32

Without AVX512-BF16, activations are stored as float32 (`mixed`), and the two halves of a word of w
are widened and multiplied one after the other. Weights that were widened beforehand
(`linear.multiply_widened`) are multiplied in the same order, with the same bits. LLVM lowers the
vectors of 16 to the registers of the CPU. Bits are equal within one kind of CPU.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mellmpi.engine.cpu.disk_cache import link, object_code
from mellmpi.engine.cpu.features import HAS_BF16_DOT, MR, WIDENED_MR, WIDENED_VECTORS
from mellmpi.engine.cpu.shapes import Parts, View
from mellmpi.engine.cpu.vectors import (
    BYTES,
    F32X16,
    I32,
    I32X16,
    I64,
    LANES,
    UPPER,
    Builder,
    Emitted,
    element_pointer,
    external,
    fused,
    holds_bfloat16,
    i64,
    lanes_of,
    offset,
    prefetch_line,
    read,
    splat,
    write,
)

VECTOR_BYTES = 4 * LANES


class BFloat(ir.Type):
    """LLVM's type `bfloat`, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


BF16X32 = ir.VectorType(BFloat(), 2 * LANES)


# One step of k for one row: a word of `a` times the words of a vector of columns.


def _step_bf16_dot(b: Builder, accumulator: Emitted, a: Emitted, w: Emitted) -> Emitted:
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    dot = external(b, name, F32X16, F32X16, BF16X32, BF16X32)
    return b.call(dot, [accumulator, b.bitcast(w, BF16X32), b.bitcast(splat(b, a), BF16X32)])


def _step_f32(b: Builder, accumulator: Emitted, a: Emitted, w: Emitted) -> Emitted:
    return fused(b, b.bitcast(splat(b, a), F32X16), b.bitcast(w, F32X16), accumulator)


class _Rows:
    """Pointers to equidistant rows: one register for four rows, by x86's addressing modes."""

    def __init__(self, b: Builder, first: Emitted, stride: Emitted, rows: int):
        self.bases = [offset(b, first, b.mul(stride, i64(r))) for r in range(0, rows, 4)]
        self.strides = [b.mul(stride, i64(r)) for r in range(min(rows, 4))]

    def at(self, b: Builder, row: int) -> Emitted:
        return offset(b, self.bases[row // 4], self.strides[row % 4])


def _loop(
    b: Builder, times: Emitted, carried: list[Emitted], body: Callable[..., list[Emitted]]
) -> list[Emitted]:
    """Emit a loop of `times` >= 1 iterations: `body(index, carried)` returns the next `carried`."""
    before, loop = b.block, b.append_basic_block("loop")
    after = b.append_basic_block("exit")
    b.branch(loop)
    b.position_at_end(loop)
    index, entered = b.phi(I64), [b.phi(value.type) for value in carried]
    left = body(index, entered)
    following = b.add(index, i64(1))
    for phi, first, again in zip(
        [index, *entered], [i64(0), *carried], [following, *left], strict=True
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(again, b.block)
    b.cbranch(b.icmp_signed("<", following, times), loop, after)
    b.position_at_end(after)
    return left


def _halves(b: Builder, kind: str, columns: list[Emitted]) -> list[list[Emitted]]:
    """The operands that a step multiplies in order: the columns, or both halves of their words."""
    if kind != "mixed":
        return [columns]
    sixteen, upper = lanes_of(16, I32X16), lanes_of(UPPER, I32X16)
    return [[b.shl(c, sixteen) for c in columns], [b.and_(c, upper) for c in columns]]


def _emit_product(b: Builder, rows: int, width: int, kind: str, p: dict[str, Emitted]) -> None:
    """Emit `rows` rows times `width` vectors of columns: all parts of k, all steps of each."""
    grid = [(row, column) for row in range(rows) for column in range(width)]
    a = _Rows(b, p["a"], p["a_stride"], rows)
    init = _Rows(b, p["init"], p["init_stride"], rows)
    out = _Rows(b, p["out"], p["out_stride"], rows)
    size, num_bases = i64(SIZES[kind]), len(a.bases)
    last = b.sub(p["num_parts"], i64(1))

    def part(index: Emitted, carried: list[Emitted]) -> list[Emitted]:
        w, ahead = (
            offset(b, p["w"], b.mul(read(b, offset(b, p[name], b.mul(index, i64(8))), I64), size))
            for name in ("parts", "prefetch")
        )
        steps = b.select(b.icmp_signed("==", index, last), p["last_steps"], p["steps"])
        return _loop(b, steps, [w, ahead, *carried], step)[2:]

    def step(index: Emitted, carried: list[Emitted]) -> list[Emitted]:
        w, ahead, *rest = carried
        a.bases, sums = rest[:num_bases], rest[num_bases:]
        columns = [read(b, offset(b, w, i64(VECTOR_BYTES * c)), I32X16) for c in range(width)]
        for c in range(width):
            prefetch_line(b, offset(b, ahead, i64(VECTOR_BYTES * c)))
        for half, operands in enumerate(_halves(b, kind, columns)):
            words = [read(b, offset(b, a.at(b, row), i64(4 * half)), I32) for row in range(rows)]
            sums = [
                STEPS[kind](b, sums[row * width + c], words[row], operands[c]) for row, c in grid
            ]
        advanced = [offset(b, base, i64(A_BYTES[kind])) for base in a.bases]
        return [offset(b, w, p["w_step"]), offset(b, ahead, p["w_step"]), *advanced, *sums]

    begin = [read(b, offset(b, init.at(b, r), i64(VECTOR_BYTES * c)), F32X16) for r, c in grid]
    results = _loop(b, p["num_parts"], [*a.bases, *begin], part)[num_bases:]
    for (r, c), result in zip(grid, results, strict=True):
        write(b, result, offset(b, out.at(b, r), i64(VECTOR_BYTES * c)))


def _emit_row_counts(b: Builder, width: int, kind: str, p: dict[str, Emitted]) -> None:
    """Emit the product once for each number of rows, and the choice between them."""
    done = b.append_basic_block("done")
    chosen = b.switch(p["rows"], done)
    for count in range(1, most_rows(width, kind) + 1):
        block = b.append_basic_block(f"rows{count}")
        chosen.add_case(i64(count), block)
        b.position_at_end(block)
        _emit_product(b, count, width, kind, p)
        b.branch(done)
    b.position_at_end(done)


# --- machine code --------------------------------------------------------------------------------

STEPS = {"float32": _step_f32}
STEPS |= {"bfloat16": _step_bf16_dot} if HAS_BF16_DOT else {"mixed": _step_f32}
SIZES = {"float32": 4, "mixed": 2, "bfloat16": 2}  # bytes of an element of w
A_BYTES = {"float32": 4, "mixed": 8, "bfloat16": 4}  # bytes of a row of `a` that a step multiplies


def most_rows(width: int, kind: str) -> int:
    """MR of the micro-kernel of `width` vectors of columns."""
    widened = width == WIDENED_VECTORS and kind == "float32"
    return max(MR[width], WIDENED_MR) if widened else MR[width]


def kind_of(a: types.Array, w: types.Array) -> str:
    """The kind of micro-kernel for arrays of these dtypes: a key of `SIZES`."""
    if not holds_bfloat16(w):
        assert not holds_bfloat16(a) and w.dtype == types.float32, (a, w)
        return "float32"
    return "bfloat16" if holds_bfloat16(a) else "mixed"


POINTERS = ("a", "w", "parts", "prefetch", "init", "out")
PARAMETERS = (  # strides and w_step in bytes
    *("rows", "a", "a_stride", "w", "parts", "prefetch", "num_parts", "w_step", "steps"),
    *("last_steps", "init", "init_stride", "out", "out_stride"),
)
TAKES = [BYTES if name in POINTERS else I64 for name in PARAMETERS]


def _symbol(width: int, kind: str) -> str:
    return f"mellmpi_gemm{width * LANES}_{kind}"


def _define(module: ir.Module, width: int, kind: str) -> None:
    name = _symbol(width, kind)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), TAKES), name)
    b = ir.IRBuilder(function.append_basic_block())
    _emit_row_counts(b, width, kind, dict(zip(PARAMETERS, function.args, strict=True)))
    b.ret_void()


CHOICES = [(width, kind) for width in MR for kind in STEPS]


def microkernels() -> str:
    """LLVM assembly of all micro-kernels."""
    module = ir.Module()
    for choice in CHOICES:
        _define(module, *choice)
    return str(module)


# Numba would compile them again for each function that calls them, directly or through others,
# which takes longer than all other kernels together.
CODE = link(object_code(microkernels), [_symbol(*choice) for choice in CHOICES])

VIEW = types.NamedUniTuple(types.int64, len(View._fields), View)
PARTS = types.NamedUniTuple(types.int64, len(Parts._fields), Parts)


def _microkernel(width: int) -> Any:
    @intrinsic
    def microkernel(
        typing, rows, a, a_view, w, w_view, offsets, parts, init, init_view, out, out_view
    ):
        assert init.dtype == types.float32 and out.dtype == types.float32, (a, w, init, out)
        kind = kind_of(a, w)
        takes = (types.int64, a, VIEW, w, VIEW, offsets, PARTS, init, VIEW, out, VIEW)

        def emit(context, b, sig, args):
            def pointer(array, at):
                return element_pointer(context, b, takes[array], args[array], at)

            views = [cgutils.unpack_tuple(b, args[i], 2) for i in (2, 4, 8, 10)]
            (a_at, a_stride), (w_at, w_step), (init_at, init_stride), (out_at, out_stride) = views
            first, prefetch, num_parts, steps, last_steps = cgutils.unpack_tuple(b, args[6], 5)
            a_size, w_size = i64(a.dtype.bitwidth // 8), i64(SIZES[kind])
            values = [
                *(args[0], pointer(1, a_at), b.mul(a_stride, a_size), pointer(3, w_at)),
                *(pointer(5, first), pointer(5, prefetch), num_parts, b.mul(w_step, w_size)),
                *(steps, last_steps, pointer(7, init_at), b.mul(init_stride, i64(4))),
                *(pointer(9, out_at), b.mul(out_stride, i64(4))),
            ]
            b.call(external(b, _symbol(width, kind), ir.VoidType(), *TAKES), values)
            return context.get_dummy_value()

        return types.void(*takes), emit

    return microkernel


microkernel16, microkernel32, microkernel64 = (_microkernel(width) for width in MR)
"""microkernelN: out[0 : rows, 0 : N] = init + a @ w, added in the order of k.

rows       1 … MR[N / 16]
a, a_view  activations as `kind_of` takes them, and their `View`
w, w_view  packed weights or KV; the N columns of a step are contiguous, and the stride of the view
           is from step to step
offsets    int64: elements from the start of w's view to each part (see `Parts`)
parts      how k is divided into parts; `a` goes on from part to part
init, out  float32 arrays and their views; a stride of 0 in init_view: all rows begin equal
"""
