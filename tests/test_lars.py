"""LARS: zero weights and skipped updates. test_updates.py has its formula."""

import torch

from mae.training.lars import LARS


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3)),
            torch.nn.Parameter(torch.zeros(2, 2))]  # fmt: skip


def steps(optimizer, weights, count):
    torch.manual_seed(1)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def test_zero_weights_are_updated():
    weights = parameters()
    assert steps(LARS(weights, lr=0.1), weights, 1)[2].abs().sum() > 0


def test_found_inf_skips_the_update():
    weights = parameters()
    optimizer = LARS(weights, lr=0.1)
    before = steps(optimizer, weights, 2)
    momenta = [optimizer.state[w]["momentum"].clone() for w in weights]
    optimizer.found_inf = torch.tensor(1.0)
    for weight in weights:
        weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert all(torch.equal(m, optimizer.state[w]["momentum"]) for m, w in zip(momenta, weights, strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    assert not torch.equal(steps(optimizer, weights, 1)[0], before[0])


def test_a_state_of_the_published_code_has_another_name():
    before, after = parameters(), parameters()
    optimizer, other = LARS(before, lr=0.1), LARS(after, lr=0.1)
    steps(optimizer, before, 2)
    state = optimizer.state_dict()
    state["state"] = {number: {"mu": moments["momentum"].clone()} for number, moments in state["state"].items()}
    other.load_state_dict(state)
    for old, new in zip(before, after, strict=True):
        new.data.copy_(old)
    ours, theirs = (steps(one, weights, 1) for one, weights in ((optimizer, before), (other, after)))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
