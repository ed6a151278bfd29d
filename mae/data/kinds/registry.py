"""The kinds of datasets that are no folders, for the parsers: this module imports no PyTorch."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mae.registry import lazily


class Kind(NamedTuple):
    """An entry of KINDS."""

    help: str  # what follows the prefix and its colon
    function: Callable[..., Any]  # function(name, split, data, task, function) -> Source | Stream
    uses: tuple[str, ...] = ()  # which of download, num_images and data_path have an effect
    has_labels: bool = True


# The kinds of --dataset, by the prefix of a value; "" for values without one. `name` is a value without its prefix, and
# the other arguments are those of `open_source`.
KINDS = {
    "": Kind("a class of torchvision, such as CIFAR10 or STL10:unlabeled, with its files in {folder}",
        lazily("mae.data.kinds.torchvision", "open_dataset"), ("data_path", "download")),
    "hf": Kind("NAME_OR_FOLDER (Hugging Face), with #IMAGE or #IMAGE,LABEL if several columns are possible",
        lazily("mae.data.kinds.huggingface", "open_dataset")),
    "py": Kind("MODULE:FUNCTION, your function(split, data_path) that returns a dataset (docs/data.md)",
        lazily("mae.data.kinds.targets", "open_dataset"), ("data_path",)),
    "wds": Kind("SHARDS (WebDataset), such as wds:s/{000..127}.tar",
        lazily("mae.data.kinds.shards", "open_dataset"), ("num_images",), has_labels=False),
}  # fmt: skip


def kind_of(dataset: str) -> tuple[str, str]:
    """Returns the key of KINDS for a value of --dataset, and the value without prefix."""
    prefix, _, name = dataset.partition(":")
    return (prefix, name) if prefix and prefix in KINDS else ("", dataset)
