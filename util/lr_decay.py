"""Layer-wise learning-rate decay."""

from mae.training.optimizers import param_groups_lrd
from models_vit import get_layer_id_for_vit

__all__ = ["get_layer_id_for_vit", "param_groups_lrd"]
