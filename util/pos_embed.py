"""The fixed sine-cosine position tables, and interpolation of learned tables."""

import numpy as np

from mae.position_tables import get_1d_sincos_pos_embed_from_grid, get_2d_sincos_pos_embed, interpolate_pos_embed

__all__ = [
    "get_1d_sincos_pos_embed_from_grid",
    "get_2d_sincos_pos_embed",
    "get_2d_sincos_pos_embed_from_grid",
    "interpolate_pos_embed",
]


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: np.ndarray) -> np.ndarray:
    """Returns the table (N, embed_dim) of the positions `grid` (2, ...): columns first, then rows."""
    return np.concatenate([get_1d_sincos_pos_embed_from_grid(embed_dim // 2, positions) for positions in grid], axis=1)
