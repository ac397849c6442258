"""Cosines and sines of rotary embeddings (RoPE, arXiv 2104.09864), extended as contexts grow."""

import numpy as np

from mellmpi.engine.cpu.packed_weights import padded
from mellmpi.engine.cpu.vectors import LANES
from mellmpi.models import Architecture, attention_factor, inv_freq

SEGMENT = 1024  # positions; always computed together, so that growth does not change their bits


class RopeTable:
    """Cosines and sines, float32 [positions, 2, half]; half is head_dim / 2 padded to 16."""

    def __init__(self, arch: Architecture):
        self._inv_freq, self._scale = inv_freq(arch), np.float32(attention_factor(arch))
        self._half = padded(arch.head_dim // 2, LANES)
        self._table = self._segment(0)

    def up_to(self, num_positions: int) -> np.ndarray:
        """The table, flat, for at least the positions 0 … num_positions - 1."""
        while len(self._table) < num_positions:
            count = len(self._table) // SEGMENT
            added = [self._segment(i) for i in range(count, 2 * count)]
            self._table = np.concatenate([self._table, *added])
        return self._table.ravel()

    def _segment(self, index: int) -> np.ndarray:
        positions = np.arange(index * SEGMENT, (index + 1) * SEGMENT, dtype=np.float32)
        angles = positions[:, None] * self._inv_freq  # float32, as transformers does
        table = np.zeros((SEGMENT, 2, self._half), np.float32)
        table[:, 0, : angles.shape[1]] = np.cos(angles) * self._scale
        table[:, 1, : angles.shape[1]] = np.sin(angles) * self._scale
        return table
