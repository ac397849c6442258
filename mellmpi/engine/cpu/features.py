"""What this CPU can do, as LLVM has been told, and what the kernels make of it.

`NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` hide features, to try the code of another kind of CPU.
"""

from numba.core.registry import cpu_target

TRIPLE, _, _ENABLED = cpu_target.target_context.codegen().magic_tuple()
FEATURES = frozenset(_ENABLED.split(","))
HAS_AVX512 = "+avx512f" in FEATURES
HAS_BF16_DOT = "+avx512bf16" in FEATURES
IS_ARM = TRIPLE.startswith(("aarch64", "arm64"))

# Accumulators fill the registers: 32 of 64 bytes with AVX-512, 32 of 16 bytes with NEON, else 16 of
# 32 bytes. By width of a tile in vectors of 16 columns: its rows.
if HAS_AVX512:
    MOST_ROWS = {1: 14, 2: 14, 4: 6}
elif IS_ARM:
    MOST_ROWS = {1: 6, 2: 3, 4: 1}
else:
    MOST_ROWS = {1: 4, 2: 2, 4: 1}

# Of tiles over weights that were widened to float32: vectors of columns, and rows.
WIDE_VECTORS, WIDE_ROWS = (2, 14) if HAS_AVX512 else (1, 6)
