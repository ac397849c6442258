"""Features of this CPU as LLVM is told them, and the micro-kernel sizes that follow.

`NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` hide features, to run the code of another kind of CPU.
"""

from numba.core.registry import cpu_target

TRIPLE, _, _ENABLED = cpu_target.target_context.codegen().magic_tuple()
FEATURES = frozenset(_ENABLED.split(","))
HAS_AVX512 = "+avx512f" in FEATURES
HAS_BF16_DOT = "+avx512bf16" in FEATURES
IS_ARM = TRIPLE.startswith(("aarch64", "arm64"))

# MR, the rows of a micro-kernel (Van Zee and van de Geijn, "BLIS", ACM TOMS 2015), by its columns
# NR in vectors of 16. The accumulators fill the registers: 32 of 64 bytes with AVX-512, 32 of 16
# bytes with NEON, else 16 of 32 bytes.
if HAS_AVX512:
    MR = {1: 14, 2: 14, 4: 6}
elif IS_ARM:
    MR = {1: 6, 2: 3, 4: 1}
else:
    MR = {1: 4, 2: 2, 4: 1}

# The micro-kernel over weights that were widened to float32: vectors of columns, and rows.
WIDENED_VECTORS, WIDENED_MR = (2, 14) if HAS_AVX512 else (1, 6)
