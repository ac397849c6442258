"""Whether Open MPI offers the core to others in every call that finds nothing to do.

With more ranks than cores it does, and Linux takes that for the rest of a time slice: a look for
messages takes not 0.3 us but 1 to 3 ms, as long as the others' steps. In waits of its own it is
right; ours sleep.
"""

import ctypes
from pathlib import Path

LIBRARY = "/libopen-pal.so"
SWITCH = "opal_progress_set_yield_when_idle"  # bool(bool): the new value, the one before


def set_yielding(on: bool) -> bool:
    """Switch it; whether it was on. False where this MPI has no such switch."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = [line.split(maxsplit=5)[-1] for line in lines if LIBRARY in line]
    switch = getattr(ctypes.CDLL(paths[0]), SWITCH, None) if paths else None
    if switch is None:
        return False
    switch.argtypes, switch.restype = [ctypes.c_bool], ctypes.c_bool
    return bool(switch(on))
