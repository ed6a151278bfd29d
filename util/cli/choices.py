"""Choices and defaults of flags that other packages use too."""

AMP_CHOICES = ("auto", "bf16", "fp16", "off")
ADAPT_CHOICES = ("error", "mean", "repeat", "skip")
DEFAULT_WORKERS = 10  # of --num_workers
