"""The tile product: right against torch, and the same bits for any number of rows."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit

from mellmpi.engine.cpu.features import HAS_AVX512, HAS_BF16_DOT, MOST_ROWS
from mellmpi.engine.cpu.gemm import tile16, tile32, tile64
from mellmpi.engine.cpu.packed_weights import activations, pair_of, storage

DTYPES = [torch.float32, torch.bfloat16]
ROOT = Path(__file__).parents[3]
ONE_PART = np.array([0, 64])  # where it begins, what to prefetch


@njit
def run16(rows, a, stride, w, steps, pair, init, init_stride, out):
    tile16(
        rows,
        a,
        0,
        stride,
        w,
        0,
        16 * pair,
        ONE_PART,
        0,
        1,
        1,
        steps,
        steps,
        init,
        0,
        init_stride,
        out,
        0,
        16,
    )


@njit
def run32(rows, a, stride, w, steps, pair, init, init_stride, out):
    tile32(
        rows,
        a,
        0,
        stride,
        w,
        0,
        32 * pair,
        ONE_PART,
        0,
        1,
        1,
        steps,
        steps,
        init,
        0,
        init_stride,
        out,
        0,
        32,
    )


@njit
def run64(rows, a, stride, w, steps, pair, init, init_stride, out):
    tile64(
        rows,
        a,
        0,
        stride,
        w,
        0,
        64 * pair,
        ONE_PART,
        0,
        1,
        1,
        steps,
        steps,
        init,
        0,
        init_stride,
        out,
        0,
        64,
    )


TILES = {1: run16, 2: run32, 4: run64}


def operands(dtype, columns, k=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(16, k, generator=generator).to(dtype)
    w = torch.randn(columns, k, generator=generator).to(dtype)
    pair = pair_of(dtype)
    panel = w.view(columns, k // pair, pair).transpose(0, 1).contiguous()
    return a, w, activations(a).ravel(), storage(panel).ravel(), k // pair, pair


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", TILES)
def test_a_tile_is_the_product_added_to_what_it_started_with(dtype, width):
    a, w, flat, panel, steps, pair = operands(dtype, 16 * width)
    init = np.linspace(-3, 3, 16 * width, dtype=np.float32)
    out = np.zeros((16, 16 * width), np.float32)
    rows = MOST_ROWS[width]
    TILES[width](rows, flat, 96, panel, steps, pair, init, 0, out.ravel())
    expected = a.double() @ w.double().T + torch.from_numpy(init).double()
    np.testing.assert_allclose(out[:rows], expected[:rows].numpy(), atol=2e-5)
    assert (out[rows:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", TILES)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(dtype, width):
    _, _, flat, panel, steps, pair = operands(dtype, 16 * width)
    init = np.zeros(16 * width, np.float32)
    results = []
    for rows in range(1, MOST_ROWS[width] + 1):
        out = np.zeros((16, 16 * width), np.float32)
        TILES[width](rows, flat, 96, panel, steps, pair, init, 0, out.ravel())
        results.append(out)
    for rows, out in enumerate(results, 1):
        assert np.array_equal(out[:rows], results[-1][:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_cut_along_k_has_the_same_bits(dtype):
    _, _, flat, panel, steps, pair = operands(dtype, 32)
    zero, whole = np.zeros(32, np.float32), np.zeros(2 * 32, np.float32)
    run32(2, flat, 96, panel, steps, pair, zero, 0, whole)
    parts = np.zeros(2 * 32, np.float32)
    first = steps // 3
    run32(2, flat, 96, panel, first, pair, zero, 0, parts)
    rest = (flat[first * pair :], 96, panel[first * 32 * pair :], steps - first, pair)
    run32(2, *rest, parts, 32, parts)
    assert np.array_equal(whole, parts)


@njit
def run_parts(a, stride, w, places, steps, last_steps, pair, init, out):
    num_parts = len(places) - 1
    tile32(
        2,
        a,
        0,
        stride,
        w,
        0,
        32 * pair,
        places,
        0,
        1,
        num_parts,
        steps,
        last_steps,
        init,
        0,
        0,
        out,
        0,
        32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_panel_may_lie_anywhere(dtype):
    _, _, flat, panel, steps, pair = operands(dtype, 32)
    zero, whole, parts = (np.zeros(32 * n, np.float32) for n in (1, 2, 2))
    used = steps - 3  # the last part is shorter
    run32(2, flat, 96, panel, used, pair, zero, 0, whole)
    part = steps // 6 * 32 * pair
    order = [4, 0, 5, 2, 1, 3]
    scattered = np.empty_like(panel)
    for place, piece in zip(order, panel.reshape(6, part), strict=True):
        scattered[place * part :][:part] = piece
    places = np.array([*order, 0]) * part
    last_steps = used - 5 * (steps // 6)
    run_parts(flat, 96, scattered, places, steps // 6, last_steps, pair, zero, parts)
    assert np.array_equal(whole, parts)


FILES = [f"tests/engine/kernels/test_{name}.py" for name in ("tile", "linear", "attention")]
KINDS = {  # CPU and features, as numba compiles for them; on any x86 that has as much
    "haswell": "+avx2,+fma",
    "skylake-avx512": "+avx512f,+avx512dq,+avx512bw,+avx512vl,+avx2,+fma",
}


@pytest.mark.skipif("NUMBA_CPU_NAME" in os.environ, reason="this is the imitated CPU")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="it is an x86 that is imitated")
@pytest.mark.parametrize("cpu", KINDS)
def test_a_cpu_with_less_computes_the_same_products(cpu):
    """All of these tests again, as on a CPU without bfloat16 products, or without AVX-512."""
    if "avx512" in cpu and not HAS_AVX512:
        pytest.skip("this CPU has no AVX-512")
    environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": KINDS[cpu]}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *FILES]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


DIGEST = """
import hashlib, sys
import torch
from tests.engine.cpu.test_linear import Layer
for dtype in (torch.float32, torch.bfloat16):
    digest = hashlib.sha256()
    for rows in (1, 7, 100):
        for result in Layer(dtype).run(rows):
            digest.update(result.float().numpy().tobytes())
    print(digest.hexdigest())
"""


@pytest.mark.skipif(not HAS_AVX512, reason="only a CPU with AVX-512 imitates both")
def test_all_cpus_agree_in_float32_and_those_without_bfloat16_products_in_bfloat16():
    def digests(cpu):
        named = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": KINDS[cpu]} if cpu else {}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST],
            capture_output=True,
            text=True,
            env=os.environ | named,
            cwd=ROOT,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    haswell, skylake, this = map(digests, (*KINDS, None))
    assert haswell == skylake and haswell[0] == this[0]
    assert (haswell[1] == this[1]) == (not HAS_BF16_DOT)


NEON = """
from llvmlite import binding as llvm
from numba.core.codegen import CPUCodegen
llvm.initialize_all_targets(); llvm.initialize_all_asmprinters()
KIND = ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+fp-armv8")
CPUCodegen.magic_tuple = lambda self: KIND
from mellmpi.engine.cpu import disk_cache as compiled
code = {}
compiled.object_code = lambda module: code.setdefault("ir", module())
compiled.link = lambda text, symbols: None
from mellmpi.engine.cpu.features import IS_ARM, MOST_ROWS
from mellmpi.engine.cpu import gemm as tile
assert IS_ARM and MOST_ROWS[1] == 6
machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(
    cpu="neoverse-n1", features="+neon,+fp-armv8", opt=3)
text = machine.emit_assembly(llvm.parse_assembly(code["ir"]))
assert text.count("fmla") > 400
"""


def test_the_tiles_compile_for_arm_too():
    """Not run: no such CPU is at hand."""
    done = subprocess.run([sys.executable, "-c", NEON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
