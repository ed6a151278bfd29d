"""Pillow's antialiased bicubic scaling of color pictures, bit for bit, in a quarter of the time.

numba, which only `--fast_jpeg` requires, compiles this module at import (two seconds). The arithmetic is that of
Pillow: integer sums with weights of 22 bits, first along rows and then along columns, with rounding to bytes in
between. Here both passes work along columns, first of the transposed picture and then of the picture, because the
processor then adds rows of numbers with vector instructions.
"""

import math
from typing import Any

import numpy as np
from numba import njit

from mae.data.bicubic_weights import BITS, REACH, pixel_weights

MAX_RATIO = 100  # height to width; Pillow scales columns first if it is larger


_pixel_weights = njit(pixel_weights)


@njit
def scale_columns(rows: Any, out: Any) -> None:
    """Scales along columns: uint8 rows (n, m) into out (N, m)."""
    num_rows, width = rows.shape
    weights = np.empty(2 * math.ceil(REACH * max(num_rows / len(out), 1.0)) + 1)
    sums = np.empty(width, np.int32)
    for y in range(len(out)):
        first, last = _pixel_weights(y, num_rows, len(out), weights)
        sums[:] = 1 << (BITS - 1)  # one half, for rounding
        for k in range(last - first):
            weight, row = np.int32(weights[k]), rows[first + k]
            for x in range(width):
                sums[x] += np.int32(weight * np.int32(row[x]))
        for x in range(width):
            out[y, x] = min(max(sums[x] >> BITS, 0), 255)


@njit
def transposed(picture: Any) -> Any:
    """(h, w, 3) -> (w, h, 3). Copies in strips that fit into the cache."""
    height, width, _ = picture.shape
    out = np.empty((width, height, 3), np.uint8)
    for top in range(0, height, 32):
        strip, place = picture[top : top + 32], out[:, top : top + 32]
        for x in range(width):
            for y in range(len(strip)):
                for c in range(3):
                    place[x, y, c] = strip[y, x, c]
    return out


@njit("uint8[:, :, ::1](uint8[:, :, :], intp, intp)")
def resize(picture: Any, height: int, width: int) -> Any:
    """uint8 picture (h, w, 3) -> (height, width, 3).

    The pixels are Pillow's for pictures that are at most MAX_RATIO times as tall as wide.
    """
    own_height, own_width, _ = picture.shape
    wide = np.empty((width, own_height * 3), np.uint8)
    scale_columns(transposed(picture).reshape(own_width, own_height * 3), wide)
    out = np.empty((height, width * 3), np.uint8)
    scale_columns(transposed(wide.reshape(width, own_height, 3)).reshape(own_height, width * 3), out)
    return out.reshape(height, width, 3)
