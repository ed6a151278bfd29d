"""Choices and defaults of flags that other packages also use."""

AMP_CHOICES = ("auto", "bf16", "fp16", "off")
ADAPT_CHOICES = ("error", "mean", "repeat", "skip")
DEFAULT_WORKERS = 10  # default of --num_workers
