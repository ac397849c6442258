"""Cosines and sines of rotary embeddings, made as contexts grow."""

import numpy as np

from mellmpi.engine.cpu.packed_weights import padded
from mellmpi.engine.cpu.vectors import LANES
from mellmpi.models import Architecture, attention_factor, inv_freq

SEGMENT = 1024  # positions; always computed whole, so that an angle's bits never depend on growth


class RotaryTable:
    """float32 [positions, 2, half]: cosines, sines; half is head_dim / 2 padded to 16."""

    def __init__(self, arch: Architecture):
        self._inv_freq, self._scale = inv_freq(arch), np.float32(attention_factor(arch))
        self._half = padded(arch.head_dim // 2, LANES)
        self._table = self._segment(0)

    def upto(self, num_positions: int) -> np.ndarray:
        """The table for positions 0 … num_positions - 1 and perhaps more, flat."""
        while len(self._table) < num_positions:
            have = len(self._table) // SEGMENT
            more = [self._segment(i) for i in range(have, 2 * have)]
            self._table = np.concatenate([self._table, *more])
        return self._table.ravel()

    def _segment(self, index: int) -> np.ndarray:
        positions = np.arange(index * SEGMENT, (index + 1) * SEGMENT, dtype=np.float32)
        angles = positions[:, None] * self._inv_freq  # float32, as transformers does
        table = np.zeros((SEGMENT, 2, self._half), np.float32)
        table[:, 0, : angles.shape[1]] = np.cos(angles) * self._scale
        table[:, 1, : angles.shape[1]] = np.sin(angles) * self._scale
        return table
