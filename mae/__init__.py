"""The library: `from mae import get_model`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae.inference.model import get_model, inference_model, list_models
else:

    def __getattr__(name: str) -> Any:
        """Imports the functions of `mae.inference` at their first use: training needs none of them."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from mae.inference import model

        return getattr(model, name)


__all__ = ["get_model", "inference_model", "list_models"]
