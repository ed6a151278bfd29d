"""Values as bytes without code: JSON and arrays. The processes of a run exchange these; a pickle could run code.

The bytes are the length of the JSON text (8 bytes), the text, and the contents of arrays and tensors. The text names
the types of values. The reader creates no types other than those of this module and those that it states itself.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# An exception becomes the first of these that it is an instance of.
ERRORS: dict[str, type[Exception]] = {
    "value": ValueError, "arithmetic": ArithmeticError, "memory": MemoryError, "runtime": RuntimeError,
    "other": Exception,
}  # fmt: skip
# Types that are created from one described value.
SIMPLE: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "dict": dict, "path": Path}


def dumps(value: Any, types: Sequence[type] = ()) -> bytes:
    """Converts a value to bytes.

    Args:
        value: plain values, lists, tuples, dictionaries, paths, arrays, tensors, exceptions, and objects of
            `types`, nested.
        types: classes whose objects are described by their attributes.

    Raises:
        TypeError: the value contains something else.
    """
    parts: list[bytes] = []
    text = json.dumps(_describe(value, types, parts)).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _describe(value: Any, types: Sequence[type], parts: list[bytes]) -> Any:
    def several(values: Any) -> list[Any]:
        return [_describe(one, types, parts) for one in values]

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is list:
        return several(value)
    if isinstance(value, tuple):
        return {"tuple": several(value)}
    if isinstance(value, dict):
        return {"dict": several(value.items())}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        values = value.detach().cpu().contiguous().flatten()
        raw = (values if values.numel() else values.new_empty(0)).view(torch.uint8).numpy()  # a view needs strides
        return {"tensor": [dtype, list(value.shape), _store(raw, parts)]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufcSU":
        return {"array": [value.dtype.str, list(value.shape), _store(value, parts)]}
    if isinstance(value, OSError):
        return {"system": [value.errno, value.strerror or str(value), value.filename and str(value.filename)]}
    if isinstance(value, BaseException):
        kind = next((name for name, error in ERRORS.items() if isinstance(value, error)), "other")
        return {"error": [kind, str(value)]}
    if type(value) in types:
        return {"object": [type(value).__name__, _describe(vars(value), types, parts)]}
    raise TypeError(f"a {type(value).__name__} is no plain data")


def _store(array: np.ndarray, parts: list[bytes]) -> list[int]:
    """Appends the content of an array, and returns its position among the parts and its size."""
    start = sum(map(len, parts))
    parts.append(array.tobytes())
    return [start, array.nbytes]


def loads(data: bytes, types: Sequence[type] = ()) -> Any:
    """Converts bytes of `dumps` to the value. Nothing in them is executed.

    Raises:
        ValueError: the bytes are not from `dumps` with these types.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        return _create(json.loads(data[8:start]), types, memoryview(data)[start:])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"a message of another process is no plain data: {error}") from error


def _create(described: Any, types: Sequence[type], content: memoryview) -> Any:
    if isinstance(described, list):
        return [_create(one, types, content) for one in described]
    if not isinstance(described, dict):
        return described
    ((kind, value),) = described.items()
    if kind in SIMPLE:
        return SIMPLE[kind](_create(value, types, content))
    if kind in ("array", "tensor"):
        dtype, shape, (start, size) = value
        raw = np.frombuffer(content[start : start + size], np.uint8).copy()
        if kind == "array":
            return raw.view(np.dtype(str(dtype))).reshape(shape)
        values = torch.empty(len(raw), dtype=torch.uint8).copy_(torch.from_numpy(raw))
        return values.view(vars(torch)[dtype]).reshape(shape)
    if kind == "system":
        return OSError(*value)
    if kind == "error":
        return ERRORS[value[0]](value[1])
    name, attributes = value
    result: Any = object.__new__({one.__name__: one for one in types}[name])
    vars(result).update(_create(attributes, types, content))
    return result
