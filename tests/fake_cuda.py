"""Fake CUDA tensors: code runs as on a GPU, on a machine without one, and a `Record` sees every operation.

A fake tensor has a device, a dtype and a shape, and no data. Three things have stand-ins, because there is no driver:
the autograd engine, which needs a context of the device; streams and events; and the choice of the attention kernel.
"""

import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward",
            "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward",
            "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"}  # fmt: skip
NO_KERNEL = {"detach", "alias", "lift_fresh", "_unsafe_view", "set_", "empty", "empty_like", "empty_strided",
             "new_empty", "new_empty_strided"}  # fmt: skip


class Finding(NamedTuple):
    """Something that slows a GPU down.

    Attributes:
        kind: "wait" (of the host for the device), "blocking copy", "fp32 product" or "mixed devices".
        what: the operation.
        line: FILE:LINE, the innermost line of the library. A backward pass is at the line that starts it.
    """

    kind: str
    what: str
    line: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} at {self.line}"


class Record(TorchDispatchMode):
    """Records the operations on the GPU while it is active (`with record:`).

    Attributes:
        kernels: number of operations that are no views, by name.
        findings: how often each `Finding` occurred.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.findings: Counter[Finding] = Counter()

    def find(self, kind: str, what: str) -> None:
        self.findings[Finding(kind, what, _line())] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # no operation: asks for the device of a tensor
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func is aten._fused_adamw_.tensor_lr:  # it has no shapes of its own
            func, kwargs = aten._fused_adamw_.default, {**kwargs, "lr": 1.0}
        with self:  # inference mode does not resolve operations that consist of others
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        name = func.overloadpacket.__name__
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise AssertionError(f"wait: {name} at {_line()}") from error
        self._operation(func, name, _tensors((args, kwargs)), _tensors(result))
        if name in ("_to_copy", "copy_"):
            target, source = (args[0], args[1]) if name == "copy_" else (result, args[0])
            is_asynchronous = kwargs.get("non_blocking") or (name == "copy_" and True in args[2:])
            if source.is_cuda != target.is_cuda and not is_asynchronous:
                self.find(*(("wait", "copy to the host") if source.is_cuda else ("blocking copy", "to the GPU")))
        return result

    def _operation(self, func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if name not in ("_to_copy", "copy_") and len({tensor.is_cuda for tensor in inputs if tensor.ndim}) > 1:
            self.find("mixed devices", name)
        if func.is_view or name in NO_KERNEL or not any(tensor.is_cuda for tensor in [*inputs, *outputs]):
            return
        self.kernels[name] += 1
        if name in PRODUCTS and inputs[0].dtype is torch.float32:
            self.find("fp32 product", name)

    def _number(self, tensor: Tensor) -> float:
        """Reads a number: every condition is False, and other numbers are 1."""
        if tensor.is_cuda:
            self.find("wait", "reads a number")
        return 1.0 if tensor.is_floating_point() else int(tensor.dtype is not torch.bool)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_ours(file: str) -> bool:
    """Whether a file is of the library."""
    return file.startswith(f"{ROOT}/") and not file.startswith(f"{ROOT}/tests/") and "site-packages" not in file


def _line() -> str:
    frame = sys._getframe()
    while (frame := frame.f_back) and not _is_ours(frame.f_code.co_filename):
        pass
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}" if frame else "?"


def _stand_ins(record: Record) -> dict[str, Any]:
    """Returns what replaces functions and classes of PyTorch, by their names."""

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.kernels_before = -1

        def record(self, stream: Any = None) -> None:
            self.kernels_before = record.kernels.total()

        def synchronize(self) -> None:
            if self.kernels_before == record.kernels.total():  # else the GPU has work meanwhile
                record.find("wait", "the event behind all work")

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Any) -> float:
            return 1.0

    class Stream:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def record_event(self, event: Any = None) -> Any:
            event = event or Event()
            event.record()
            return event

        def synchronize(self) -> None:
            record.find("wait", "synchronize")

        def wait_event(self, event: Any) -> None:
            """The device waits, not the host."""

        def wait_stream(self, stream: Any) -> None:
            """The device waits, not the host."""

    return {
        "torch.cuda.is_available": lambda: True, "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.cuda.max_memory_allocated": lambda device=None: 0,
        "torch.cuda.reset_peak_memory_stats": lambda device=None: None,
        "torch.cuda.Stream": Stream, "torch.cuda.Event": Event, "torch.cuda.current_stream": Stream,
        "torch.cuda.stream": lambda stream: contextlib.nullcontext(),
        "torch.cuda.synchronize": lambda device=None: record.find("wait", "synchronize"),
        "torch.Tensor.record_stream": lambda self, stream: None,
        "torch.Tensor.backward": backward,
        "torch._C._current_graph_task_id": lambda: 1,  # checkpointing recomputes a block once per backward pass
        "torch._subclasses.fake_tensor.FakeTensor.numpy": _numpy,
        "torch._subclasses.fake_tensor.FakeTensorMode.avoid_device_init": True,
        "torch._subclasses.fake_tensor.init_gpu_context": lambda device: None,  # of PyTorch 2.11
        "torch.nn.functional.scaled_dot_product_attention": _attention,
    }  # fmt: skip


@contextlib.contextmanager
def fake_cuda() -> Iterator[Record]:
    """In this context, tensors are fake, also those on the GPU. Yields a record, which is not active yet."""
    record = Record()
    _clear_caches()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copy.deepcopy does
        # The mode is first: without a GPU, it replaces the guard of CUDA devices by one that does nothing.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for name, value in _stand_ins(record).items():
            stack.enter_context(patch(name, value, create=True))
        stack.callback(_clear_caches)
        yield record


def _clear_caches() -> None:
    """Clears the caches of the library, which would keep fake tensors."""
    for module in [*sys.modules.values()]:
        if _is_ours(getattr(module, "__file__", None) or ""):
            for function in vars(module).values():
                if isinstance(function, functools._lru_cache_wrapper):
                    function.cache_clear()


def on_gpu(build: Callable[[], nn.Module]) -> nn.Module:
    """Returns a model with fake weights on the GPU."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = build()
    return model.to_empty(device=DEVICE)


def _numpy(tensor: Tensor) -> np.ndarray:
    assert not tensor.is_cuda
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """The kernels that a GPU chooses: flash attention in half precision without a mask."""
    if attn_mask is not None or q.dtype is torch.float32:
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, q.requires_grad)[0]
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


def backward(loss: Tensor, *_: Any, **__: Any) -> None:
    """`loss.backward()`, which runs the nodes of the graph in Python."""
    graph: dict[Any, list[Any]] = {}
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node not in graph:
            graph[node] = [after for after, _ in node.next_functions if after is not None]
            nodes += graph[node]
    gradients = {loss.grad_fn: {loss.output_nr: torch.ones_like(loss)}}  # of the outputs of each node, by number
    with torch.no_grad():
        for node in reversed([*TopologicalSorter(graph).static_order()]):
            given = gradients.pop(node, {})
            if hasattr(node, "variable"):  # a leaf
                _accumulate(node.variable, given)
            elif given:
                for after, number, gradient in _run(node, given):
                    slot = gradients.setdefault(after, {})
                    slot[number] = slot[number] + gradient if number in slot else gradient


def _accumulate(leaf: Tensor, given: dict[int, Tensor]) -> None:
    for gradient in given.values():
        for hook in (leaf._backward_hooks or {}).values():
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _run(node: Any, given: dict[int, Tensor]) -> Iterator[tuple[Any, int, Tensor]]:
    """Yields the gradients that a node passes on: the next node, the number of its output, and the gradient."""
    function = node if callable(node) else node.apply  # the latter of a torch.autograd.Function
    results = function(*(given.get(number) for number in range(len(node._input_metadata))))
    results = results if isinstance(results, tuple) else (results,)
    assert results[len(node.next_functions) :].count(None) == len(results[len(node.next_functions) :])
    for (after, number), gradient in zip(node.next_functions, results, strict=False):  # others are of no tensors
        if after is not None and gradient is not None:
            meta = after.variable if hasattr(after, "variable") else after._input_metadata[number]
            gradient = gradient if gradient.shape == meta.shape else gradient.sum_to_size(meta.shape)
            yield after, number, gradient.to(meta.dtype)
