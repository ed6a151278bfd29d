"""Layer-wise learning-rate decay."""

from mae.training.param_groups import get_layer_id_for_vit, param_groups_lrd

__all__ = ["get_layer_id_for_vit", "param_groups_lrd"]
