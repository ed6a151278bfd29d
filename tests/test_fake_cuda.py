"""The GPU is kept busy: training and evaluation on fake CUDA tensors, without a GPU (`cuda_cases.py`)."""

import json
import linecache
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import cuda_cases
import fake_cuda
import pytest
import torch
from conftest import ROOT

from mae.data.transforms import Normalize
from mae.training import transaction
from mae.training.precision import Precision
from models_vit import Mlp

PLANTED_IN = ("linear probe", "bf16")  # the fastest case
record = cache(cuda_cases.record)
every_run = pytest.mark.parametrize(("name", "amp"), cuda_cases.RUNS)


@every_run
def test_nothing_waits_for_the_gpu_copies_synchronously_or_multiplies_in_fp32(name, amp):
    assert cuda_cases.problems(name, record(name, amp)) == []


@every_run
def test_no_more_kernels_are_started_than_recorded(name, amp):
    recorded = json.loads(cuda_cases.RECORDED.read_text()).get(cuda_cases.version())
    if recorded is None:
        pytest.skip(f"not recorded for PyTorch {cuda_cases.version()}: python tests/cuda_cases.py --write")
    assert record(name, amp).kernels.total() <= recorded[f"{name}, {amp}"]


def without_autocast(function: Any, *args: Any) -> Any:
    with torch.autocast("cuda", enabled=False):
        return function(*args)


class Fault(NamedTuple):
    """Replaces an attribute of `owner` by `replace(attribute)`. It is found at a line that contains `line`."""

    kind: str
    owner: Any
    attribute: str
    replace: Callable[[Any], Any]
    line: str


def in_loop(before: Callable[[torch.Tensor], Any]) -> Fault:
    """A wait before the backward pass of each iteration."""

    def replace(call: Any) -> Any:
        return lambda self, loss: (before(loss), call(self, loss))

    return Fault("wait", Precision, "backward", replace, "backward(")


FAULTS = {
    "float(loss) in the loop": in_loop(float),
    "loss.cpu() in the loop": in_loop(torch.Tensor.cpu),
    "torch.cuda.synchronize() in the loop": in_loop(lambda loss: torch.cuda.synchronize()),
    "every update is read at once": Fault("wait", transaction, "UPDATES_IN_FLIGHT", lambda _: 0, "synchronize("),
    ".to(device) without non_blocking":
        Fault("blocking copy", torch.Tensor, "to", lambda call: lambda self, *to, **_: call(self, *to), ".to("),
    "an Mlp outside autocast":
        Fault("fp32 product", Mlp, "forward", lambda call: lambda *x: without_autocast(call, *x), "self.fc1("),
    "an index on the host":
        Fault("mixed devices", Normalize, "forward", lambda call: lambda *x: call(*x)[torch.arange(8)], "normalize("),
}  # fmt: skip


def with_fault(monkeypatch: Any, fault: Fault) -> fake_cuda.Record:
    record(*PLANTED_IN)  # without the fault, for comparison
    monkeypatch.setattr(fault.owner, fault.attribute, fault.replace(getattr(fault.owner, fault.attribute)))
    return cuda_cases.record(*PLANTED_IN)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_its_line_is_named(monkeypatch, name):
    planted, fault = with_fault(monkeypatch, FAULTS[name]), FAULTS[name]
    print(f"{name}: ", *cuda_cases.problems(PLANTED_IN[0], planted), sep="\n    ")
    assert cuda_cases.problems(PLANTED_IN[0], planted)
    found = planted.findings - record(*PLANTED_IN).findings
    assert {finding.kind for finding in found} == {fault.kind}
    lines = [finding.line.split(":") for finding in found]
    assert any(fault.line in linecache.getline(str(ROOT / file), int(number)) for file, number in lines)


def test_a_planted_data_dependent_shape_ends_the_case_and_its_line_is_named(monkeypatch):
    with pytest.raises(AssertionError, match=r"wait: nonzero at \S+\.py:\d+"):
        with_fault(monkeypatch, in_loop(torch.nonzero))


def test_a_planted_kernel_is_counted(monkeypatch):
    planted = with_fault(monkeypatch, in_loop(torch.abs))
    assert planted.kernels - record(*PLANTED_IN).kernels == {"abs": 2}  # of two updates


def test_the_backward_pass_in_python_has_the_gradients_of_the_engine(mini_mae):
    images, noise = torch.rand(2, 1, 16, 16), torch.rand(2, 16)
    gradients = []
    for run in (torch.Tensor.backward, fake_cuda.backward):
        mini_mae.zero_grad()
        run(mini_mae(images, noise=noise)[0] + mini_mae(images.flip(0), noise=noise)[0])
        gradients.append([parameter.grad for parameter in mini_mae.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
