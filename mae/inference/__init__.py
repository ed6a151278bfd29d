"""Applies trained models: predictions, features, reconstructions, and exports to other libraries."""

from mae.inference.model import get_model, inference_model, list_models

__all__ = ["get_model", "inference_model", "list_models"]
