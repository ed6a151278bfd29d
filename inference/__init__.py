"""Using trained models: predictions, features, reconstructions, other libraries' formats."""

from inference.model import get_model, inference_model, list_models

__all__ = ["get_model", "inference_model", "list_models"]
