"""Warm-up, a constant learning rate, and a linear decay in the last fifth (Hu et al. 2024, section 4).

    python main_pretrain.py --lr_schedule examples.stable_decay:stable_decay ...

A checkpoint of the constant part does not depend on the length of the run.
"""


def stable_decay(progress: float) -> float:
    """Returns the factor of the learning rate for a progress of 0 to 1 after the warm-up."""
    return min(1.0, (1 - progress) / 0.2)
