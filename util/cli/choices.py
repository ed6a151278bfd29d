"""Choices and defaults of flags that other packages also use."""

AMP_CHOICES = ("auto", "bf16", "fp16", "off")
ADAPT_CHOICES = ("error", "mean", "repeat", "skip")
LINEAR, ATTENTIVE = PROBE_CHOICES = ("linear", "attentive")
DEFAULT_WORKERS = 10  # default of --num_workers
NUM_QUERIES = 32  # default of --num_queries
CROP_CHOICES = ("random", "none")
HEAD_CHOICES = ("linear", "dpt")  # of segmentation
