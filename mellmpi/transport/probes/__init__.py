"""Measures the links between hosts, and tests whether MPI takes device memory.

Knows the transport, but not what the results are used for.
"""

from mellmpi.transport.probes.links import BLOCK_BYTES, NUM_BLOCKS, HostArena, Probe, measure_links

__all__ = [
    "BLOCK_BYTES",
    "NUM_BLOCKS",
    "HostArena",
    "Probe",
    "measure_links",
]
