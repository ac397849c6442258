"""Addresses of the blocks of an arena, for cross-memory reads."""

import os

SMALL_BLOCK_BYTES = 10_000
PID = os.getpid()  # a process may also read its own memory in this way


def addresses(arena, ids):
    return tuple(arena.address + i * arena.block_bytes for i in ids)
