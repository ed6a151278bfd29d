"""LARS, the optimizer of linear probing."""

from mae.training.lars import LARS

__all__ = ["LARS"]
