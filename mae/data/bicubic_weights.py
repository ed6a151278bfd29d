"""The weights of Pillow's antialiased bicubic scaling, as a matrix."""

from functools import cache

import numpy as np

ONE = 1 << 22  # Pillow's weights are integers, and this one is 1
REACH = 2  # half the width of the bicubic kernel, in pixels


@cache
def weights(length: int, size: int) -> np.ndarray:
    """Returns the weights of a scaling from `length` to `size` pixels, (size, length). Sums of bytes are exact in fp64.

    The kernel is the cubic convolution of Keys (1981) with a = -1/2.
    """
    result = np.zeros((size, length))
    factor = length / size
    stretch = max(factor, 1.0)  # widens the kernel: antialiasing
    for number in range(size):
        center = (number + 0.5) * factor
        first = max(int(center - REACH * stretch + 0.5), 0)
        last = min(int(center + REACH * stretch + 0.5), length)
        distance = np.abs((np.arange(first, last) - center + 0.5) * (1 / stretch))
        inner = (1.5 * distance - 2.5) * distance * distance + 1
        outer = -0.5 * (((distance - 5) * distance + 8) * distance - 4)
        kernel = np.where(distance < 1, inner, np.where(distance < REACH, outer, 0.0))
        exact = kernel * (1 / np.cumsum(kernel)[-1]) * ONE  # Pillow adds the values in this order, too
        result[number, first:last] = np.trunc(exact + np.copysign(0.5, exact)) / ONE
    return result
