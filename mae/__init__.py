"""The library: `from mae import get_model`."""
