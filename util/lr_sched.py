"""The learning rate of an iteration."""

from mae.training.lr_sched import adjust_learning_rate

__all__ = ["adjust_learning_rate"]
