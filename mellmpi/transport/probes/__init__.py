"""Measures links between hosts, and whether MPI takes device memory.

Knows the transport; not what its figures are used for.
"""

from mellmpi.transport.probes.links import BLOCK_BYTES, NUM_BLOCKS, HostArena, Probe, measure_links

__all__ = [
    "BLOCK_BYTES",
    "NUM_BLOCKS",
    "HostArena",
    "Probe",
    "measure_links",
]
