"""Micro-kernels: equal to torch, and the same bits for any number of rows."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit

from mellmpi.engine.cpu.features import HAS_AVX512, HAS_BF16_DOT, MR
from mellmpi.engine.cpu.gemm import microkernel16, microkernel32, microkernel64
from mellmpi.engine.cpu.packed_weights import activations, pair_of, storage
from mellmpi.engine.cpu.shapes import Parts, View

DTYPES = [torch.float32, torch.bfloat16]
ROOT = Path(__file__).parents[3]
ONE_PART = np.array([0, 64])  # offsets of the part, and of prefetches


def runner(microkernel, columns):
    """The micro-kernel over operands that begin at 0, in one part, from any caller of numba."""

    @njit
    def run(rows, a, stride, w, steps, pair, init, init_stride, out):
        a_view, w_view, parts = (
            View(0, stride),
            View(0, columns * pair),
            Parts(0, 1, 1, steps, steps),
        )
        init_view, out_view = View(0, init_stride), View(0, columns)
        microkernel(rows, a, a_view, w, w_view, ONE_PART, parts, init, init_view, out, out_view)

    return run


run16, run32, run64 = (
    runner(microkernel, columns)
    for microkernel, columns in ((microkernel16, 16), (microkernel32, 32), (microkernel64, 64))
)
RUNNERS = {1: run16, 2: run32, 4: run64}


def operands(dtype, columns, k=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(16, k, generator=generator).to(dtype)
    w = torch.randn(columns, k, generator=generator).to(dtype)
    pair = pair_of(dtype)
    panel = w.view(columns, k // pair, pair).transpose(0, 1).contiguous()
    return a, w, activations(a).ravel(), storage(panel).ravel(), k // pair, pair


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", RUNNERS)
def test_the_output_is_the_product_plus_the_initial_values(dtype, width):
    a, w, flat, panel, steps, pair = operands(dtype, 16 * width)
    init = np.linspace(-3, 3, 16 * width, dtype=np.float32)
    out = np.zeros((16, 16 * width), np.float32)
    rows = MR[width]
    RUNNERS[width](rows, flat, 96, panel, steps, pair, init, 0, out.ravel())
    expected = a.double() @ w.double().T + torch.from_numpy(init).double()
    np.testing.assert_allclose(out[:rows], expected[:rows].numpy(), atol=2e-5)
    assert (out[rows:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", RUNNERS)
def test_a_row_has_the_same_bits_for_any_number_of_rows(dtype, width):
    _, _, flat, panel, steps, pair = operands(dtype, 16 * width)
    init = np.zeros(16 * width, np.float32)
    results = []
    for rows in range(1, MR[width] + 1):
        out = np.zeros((16, 16 * width), np.float32)
        RUNNERS[width](rows, flat, 96, panel, steps, pair, init, 0, out.ravel())
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
def run_parts(a, stride, w, offsets, steps, last_steps, pair, init, out):
    count = len(offsets) - 1
    a_view, w_view, parts = (
        View(0, stride),
        View(0, 32 * pair),
        Parts(0, 1, count, steps, last_steps),
    )
    init_view, out_view = View(0, 0), View(0, 32)
    microkernel32(2, a, a_view, w, w_view, offsets, parts, init, init_view, out, out_view)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_micro_panel_may_lie_anywhere(dtype):
    _, _, flat, panel, steps, pair = operands(dtype, 32)
    zero, whole, parts = (np.zeros(32 * n, np.float32) for n in (1, 2, 2))
    used = steps - 3  # the last part is shorter
    run32(2, flat, 96, panel, used, pair, zero, 0, whole)
    part = steps // 6 * 32 * pair
    order = [4, 0, 5, 2, 1, 3]
    scattered = np.empty_like(panel)
    for index, piece in zip(order, panel.reshape(6, part), strict=True):
        scattered[index * part :][:part] = piece
    offsets = np.array([*order, 0]) * part
    last_steps = used - 5 * (steps // 6)
    run_parts(flat, 96, scattered, offsets, steps // 6, last_steps, pair, zero, parts)
    assert np.array_equal(whole, parts)


FILES = [f"tests/engine/cpu/test_{name}.py" for name in ("gemm", "linear", "attention")]
KINDS = {  # name and features of a CPU that numba compiles for; runs on any x86 that has them
    "haswell": "+avx2,+fma",
    "skylake-avx512": "+avx512f,+avx512dq,+avx512bw,+avx512vl,+avx2,+fma",
}


@pytest.mark.skipif("NUMBA_CPU_NAME" in os.environ, reason="this is the emulated CPU")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="an x86 CPU is emulated")
@pytest.mark.parametrize("cpu", KINDS)
def test_a_cpu_with_fewer_features_computes_the_same_products(cpu):
    """Run these tests again as on a CPU without bfloat16 products, or without AVX-512."""
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


@pytest.mark.skipif(not HAS_AVX512, reason="only a CPU with AVX-512 can emulate both")
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


NEON = f"""
import sys
from types import ModuleType
for name in ("mellmpi.engine", "mellmpi.engine.cpu"):  # packages without their __init__
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = ["{ROOT}/" + name.replace(".", "/")]
from llvmlite import binding as llvm
from numba.core.codegen import CPUCodegen
llvm.initialize_all_targets(); llvm.initialize_all_asmprinters()
KIND = ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+fp-armv8")
CPUCodegen.magic_tuple = lambda self: KIND
from mellmpi.engine.cpu import disk_cache
code = dict()
disk_cache.object_code = lambda module: code.setdefault("ir", module())
disk_cache.link = lambda text, symbols: None
from mellmpi.engine.cpu.features import IS_ARM, MR
from mellmpi.engine.cpu import gemm
assert IS_ARM and MR[1] == 6
machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(
    cpu="neoverse-n1", features="+neon,+fp-armv8", opt=3)
text = machine.emit_assembly(llvm.parse_assembly(code["ir"]))
assert text.count("fmla") > 400
"""


def test_the_microkernels_compile_for_arm():
    """They are compiled only: running them needs an ARM CPU."""
    done = subprocess.run([sys.executable, "-c", NEON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
