"""Layer-wise learning-rate decay."""

from mae.lr_decay import get_layer_id_for_vit, param_groups_lrd

__all__ = ["get_layer_id_for_vit", "param_groups_lrd"]
