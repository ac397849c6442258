"""mellmpi: serve the same LLM load on fewer GPUs, by moving live requests between MPI ranks."""

__version__ = "0.1.0"
