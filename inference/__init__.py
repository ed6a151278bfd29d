"""Applies trained models: predictions, features, reconstructions, and exports to other libraries."""

import util  # noqa: F401  # first, as it names the packages that are missing

# isort: split
from inference.model import get_model, inference_model, list_models

__all__ = ["get_model", "inference_model", "list_models"]
