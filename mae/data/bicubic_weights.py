"""The weights of Pillow's antialiased bicubic scaling, as integers."""

from typing import Any

BITS = 22  # of a weight; 8 bits of the pixel, a sign and one bit of overshoot make 32
REACH = 2  # half the width of the bicubic kernel, in pixels


def pixel_weights(number: int, length: int, size: int, weights: Any) -> tuple[int, int]:
    """Computes the weights of the pixels of which a scaled pixel is the sum. 1 << BITS is one.

    The kernel is the cubic convolution of Keys (1981) with a = -1/2. numba compiles this function for large pictures.

    Args:
        number: index of the scaled pixel.
        length: number of pixels.
        size: number of scaled pixels.
        weights: array for the weights, of at least 2 * ceil(REACH * length / size) + 1 elements.

    Returns:
        The index of the first pixel, and the index after the last one.
    """
    factor = length / size
    stretch = max(factor, 1.0)  # widens the kernel: antialiasing
    center = (number + 0.5) * factor
    first = max(int(center - REACH * stretch + 0.5), 0)
    last = min(int(center + REACH * stretch + 0.5), length)
    total = 0.0
    for k in range(last - first):
        distance = abs((first + k - center + 0.5) * (1 / stretch))
        if distance < 1:
            weights[k] = (1.5 * distance - 2.5) * distance * distance + 1
        elif distance < REACH:
            weights[k] = -0.5 * (((distance - 5) * distance + 8) * distance - 4)
        else:
            weights[k] = 0.0
        total += weights[k]
    for k in range(last - first):
        exact = weights[k] * (1 / total) * (1 << BITS)
        weights[k] = int(exact - 0.5 if exact < 0 else exact + 0.5)
    return first, last
