"""The one multiplication of this engine: a few rows times a panel of columns, held in registers.

Every output element is one SIMD lane of one accumulator, and the lane adds its products in the
order of k. So an element has the same bits whatever the number of rows beside it, and however the
rows of a batch were split into tiles: this is what makes a token independent of its batch.

A panel stores, for each step of k, the columns side by side. A step is one float32 a column, or
two bfloat16 (k, k + 1), which is what AVX512-BF16 multiplies in one instruction:

    float32   w[step][column]            a[row][step]
    bfloat16  w[step][column][2]         a[row][step][2]
    mixed     w[step][column][2]         a[row][step][2], each a float32

Without AVX512-BF16, activations are kept as float32 (`mixed`), and the two halves of a word of w
are widened and multiplied one after the other. Weights that were widened beforehand
(`linear.multiply_wide`) are multiplied in the same order, with the same bits. LLVM lowers the
vectors of 16 to what the CPU has. Bits are equal within one kind of CPU.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mellmpi.engine.cpu.disk_cache import link, object_code
from mellmpi.engine.cpu.features import (
    HAS_BF16_DOT,
    MOST_ROWS,
    WIDE_ROWS,
    WIDE_VECTORS,
)
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
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


BF16X32 = ir.VectorType(BFloat(), 2 * LANES)


# One step for one row: the word of `a` times the words of a vector of columns.


def _step_bf16_dot(b: Builder, accumulator: Emitted, a: Emitted, w: Emitted) -> Emitted:
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    dot = external(b, name, F32X16, F32X16, BF16X32, BF16X32)
    return b.call(dot, [accumulator, b.bitcast(w, BF16X32), b.bitcast(splat(b, a), BF16X32)])


def _step_f32(b: Builder, accumulator: Emitted, a: Emitted, w: Emitted) -> Emitted:
    return fused(b, b.bitcast(splat(b, a), F32X16), b.bitcast(w, F32X16), accumulator)


class _Rows:
    """Pointers to rows a fixed stride apart: one register for four rows, as x86 addresses."""

    def __init__(self, b: Builder, first: Emitted, stride: Emitted, rows: int):
        self.bases = [offset(b, first, b.mul(stride, i64(r))) for r in range(0, rows, 4)]
        self.strides = [b.mul(stride, i64(r)) for r in range(min(rows, 4))]

    def at(self, b: Builder, row: int) -> Emitted:
        return offset(b, self.bases[row // 4], self.strides[row % 4])


def _repeat(
    b: Builder, times: Emitted, carried: list[Emitted], body: Callable[..., list[Emitted]]
) -> list[Emitted]:
    """A loop of `times`, at least 1: `body(turn, carried)` gives what the next turn carries."""
    before, loop = b.block, b.append_basic_block("turn")
    after = b.append_basic_block("turned")
    b.branch(loop)
    b.position_at_end(loop)
    turn, entered = b.phi(I64), [b.phi(value.type) for value in carried]
    left = body(turn, entered)
    following = b.add(turn, i64(1))
    for phi, first, again in zip(
        [turn, *entered], [i64(0), *carried], [following, *left], strict=True
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(again, b.block)
    b.cbranch(b.icmp_signed("<", following, times), loop, after)
    b.position_at_end(after)
    return left


def _halves(b: Builder, kind: str, columns: list[Emitted]) -> list[list[Emitted]]:
    """What a step multiplies in turn: the columns, or the two halves of their words."""
    if kind != "mixed":
        return [columns]
    sixteen, upper = lanes_of(16, I32X16), lanes_of(UPPER, I32X16)
    return [[b.shl(c, sixteen) for c in columns], [b.and_(c, upper) for c in columns]]


def _emit_tile(b: Builder, rows: int, width: int, kind: str, p: dict[str, Emitted]) -> None:
    """`rows` rows times `width` vectors of columns: all parts of k, all steps of each."""
    grid = [(row, column) for row in range(rows) for column in range(width)]
    a = _Rows(b, p["a"], p["a_stride"], rows)
    init = _Rows(b, p["init"], p["init_stride"], rows)
    out = _Rows(b, p["out"], p["out_stride"], rows)
    size, num_bases = i64(SIZES[kind]), len(a.bases)
    last = b.sub(p["num_parts"], i64(1))

    def part(turn: Emitted, carried: list[Emitted]) -> list[Emitted]:
        w, soon = (
            offset(b, p["w"], b.mul(read(b, offset(b, p[name], b.mul(turn, i64(8))), I64), size))
            for name in ("parts", "soon")
        )
        steps = b.select(b.icmp_signed("==", turn, last), p["last_steps"], p["steps"])
        return _repeat(b, steps, [w, soon, *carried], step)[2:]

    def step(turn: Emitted, carried: list[Emitted]) -> list[Emitted]:
        w, soon, *rest = carried
        a.bases, sums = rest[:num_bases], rest[num_bases:]
        columns = [read(b, offset(b, w, i64(VECTOR_BYTES * c)), I32X16) for c in range(width)]
        for c in range(width):
            prefetch_line(b, offset(b, soon, i64(VECTOR_BYTES * c)))
        for half, operands in enumerate(_halves(b, kind, columns)):
            words = [read(b, offset(b, a.at(b, row), i64(4 * half)), I32) for row in range(rows)]
            sums = [
                STEPS[kind](b, sums[row * width + c], words[row], operands[c]) for row, c in grid
            ]
        moved = [offset(b, base, i64(A_BYTES[kind])) for base in a.bases]
        return [offset(b, w, p["w_step"]), offset(b, soon, p["w_step"]), *moved, *sums]

    begin = [read(b, offset(b, init.at(b, r), i64(VECTOR_BYTES * c)), F32X16) for r, c in grid]
    results = _repeat(b, p["num_parts"], [*a.bases, *begin], part)[num_bases:]
    for (r, c), result in zip(grid, results, strict=True):
        write(b, result, offset(b, out.at(b, r), i64(VECTOR_BYTES * c)))


def _emit_choice(b: Builder, width: int, kind: str, p: dict[str, Emitted]) -> None:
    """The loops once for each possible number of rows."""
    done = b.append_basic_block("tiled")
    chosen = b.switch(p["rows"], done)
    for count in range(1, most_rows(width, kind) + 1):
        block = b.append_basic_block(f"rows{count}")
        chosen.add_case(i64(count), block)
        b.position_at_end(block)
        _emit_tile(b, count, width, kind, p)
        b.branch(done)
    b.position_at_end(done)


# --- machine code --------------------------------------------------------------------------------

STEPS = {"float32": _step_f32}
STEPS |= {"bfloat16": _step_bf16_dot} if HAS_BF16_DOT else {"mixed": _step_f32}
SIZES = {"float32": 4, "mixed": 2, "bfloat16": 2}  # bytes of an element of w
A_BYTES = {"float32": 4, "mixed": 8, "bfloat16": 4}  # of a, that a step multiplies


def most_rows(width: int, kind: str) -> int:
    """Rows of the largest tile of so many vectors of columns."""
    wide = width == WIDE_VECTORS and kind == "float32"
    return max(MOST_ROWS[width], WIDE_ROWS) if wide else MOST_ROWS[width]


def kind_of(a: types.Array, w: types.Array) -> str:
    """How arrays of these dtypes are multiplied."""
    if not holds_bfloat16(w):
        assert not holds_bfloat16(a) and w.dtype == types.float32, (a, w)
        return "float32"
    return "bfloat16" if holds_bfloat16(a) else "mixed"


POINTERS = ("a", "w", "parts", "soon", "init", "out")
PARAMETERS = (
    "rows",
    "a",
    "a_stride",
    "w",
    "parts",
    "soon",
    "num_parts",
    "w_step",
    "steps",
    "last_steps",
    "init",
    "init_stride",
    "out",
    "out_stride",
)
TAKES = [BYTES if name in POINTERS else I64 for name in PARAMETERS]


def _symbol(width: int, kind: str) -> str:
    return f"mellmpi_tile{width * LANES}_{kind}"


def _define(module: ir.Module, width: int, kind: str) -> None:
    name = _symbol(width, kind)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), TAKES), name)
    b = ir.IRBuilder(function.append_basic_block())
    _emit_choice(b, width, kind, dict(zip(PARAMETERS, function.args, strict=True)))
    b.ret_void()


CHOICES = [(width, kind) for width in MOST_ROWS for kind in STEPS]


def tiles() -> str:
    """LLVM assembly of all tiles."""
    module = ir.Module()
    for choice in CHOICES:
        _define(module, *choice)
    return str(module)


# Not by numba: it would generate their code again for each function that calls them, directly or
# through others, which takes longer than all other kernels.
CODE = link(object_code(tiles), [_symbol(*choice) for choice in CHOICES])


def _tile(width: int) -> Any:
    @intrinsic
    def tile(
        typing,
        rows,
        a,
        a_at,
        a_stride,
        w,
        w_at,
        w_step,
        parts,
        part_at,
        soon_at,
        num_parts,
        steps,
        last_steps,
        init,
        init_at,
        init_stride,
        out,
        out_at,
        out_stride,
    ):
        index, f32 = types.int64, types.float32
        assert init.dtype == f32 and out.dtype == f32, (a, w, init, out)
        kind = kind_of(a, w)
        takes = (
            index,
            a,
            index,
            index,
            w,
            index,
            index,
            parts,
            index,
            index,
            index,
            index,
            index,
            init,
            index,
            index,
            out,
            index,
            index,
        )

        def emit(context, b, sig, args):
            def pointer(array, at):
                return element_pointer(context, b, takes[array], args[array], args[at])

            size, a_size = i64(SIZES[kind]), i64(a.dtype.bitwidth // 8)
            b.call(
                external(b, _symbol(width, kind), ir.VoidType(), *TAKES),
                [
                    args[0],
                    pointer(1, 2),
                    b.mul(args[3], a_size),
                    pointer(4, 5),
                    pointer(7, 8),
                    pointer(7, 9),
                    args[10],
                    b.mul(args[6], size),
                    *args[11:13],
                    pointer(13, 14),
                    b.mul(args[15], i64(4)),
                    pointer(16, 17),
                    b.mul(args[18], i64(4)),
                ],
            )
            return context.get_dummy_value()

        return types.void(*takes), emit

    return tile


tile16, tile32, tile64 = (_tile(width) for width in MOST_ROWS)
"""tileN: out[0 : rows, 0 : N] = init + a @ w, added in the order of k.

rows        1 … MOST_ROWS[N / 16]
a, w        as `kind_of` takes them; `_at`: index of the first element
a_stride    elements from row to row
w_step      elements from one step to the next; the N columns of a step are contiguous
parts       int64: part i of w begins parts[part_at + i] elements after w_at …
soon        … and meanwhile what begins parts[soon_at + i] after w_at is prefetched
num_parts   at least 1, of `steps` steps each and the last of `last_steps`, at least 1: elements of
            k in float32, pairs of them in bfloat16; a goes on from part to part
init, out   float32, rows `_stride` elements apart; init_stride 0: all rows begin alike
"""
