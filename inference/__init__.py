"""Using trained models: from a file to a model with everything that belongs to it."""
