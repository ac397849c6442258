"""Load generator: sends requests to any OpenAI server and measures the answers.

Contains the command `bench serve`, with the flags, the banner and the JSON keys of vLLM's command
of that name. Knows only HTTP: no scheduler, no MPI, no engine.
"""

from mellmpi.loadgen.command import bench_serve
from mellmpi.loadgen.options import BenchOptions

__all__ = ["BenchOptions", "bench_serve"]
