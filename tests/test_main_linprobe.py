"""Linear probing: the trunk stays, heads learn side by side, and the test set chooses nothing."""

import json

import pytest
import torch

import main_finetune
import main_linprobe
from models_vit import build_probe
from util import checkpoint


@pytest.fixture
def probe(classify):
    return lambda name="run", **flags: classify(main_linprobe, name, **flags)


def lines(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


@pytest.fixture
def tuned(classify):
    """An encoder that knows the classes."""
    return classify(main_finetune, "tuned", aa="none", reprob=0, lr=0.003, epochs=20, cls_token=True, drop_path=0)


@pytest.mark.parametrize("cached", [False, True])
def test_only_the_head_learns(probe, tuned, cached):
    encoder = checkpoint.read(tuned / "checkpoint-19.pth")["model"]
    flags = {"cache_features": True} if cached else {}
    out = probe(finetune=tuned / "checkpoint-19.pth", epochs=12, lr=5, **flags)
    state = checkpoint.read(out / "checkpoint-11.pth")["model"]
    assert {name for name in state if name.startswith("head.")} == {
        "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias",
    }  # fmt: skip
    assert all(torch.equal(state[name], encoder[name]) for name in state if not name.startswith("head."))
    assert lines(out)[-1]["test_acc1"] > 70
    assert lines(out)[-1]["n_parameters"] == 6 * 128 + 6


def test_the_trunk_is_in_evaluation_mode():
    settings = {"model": "vit_mini_patch4", "input_size": 16, "in_chans": 1, "patch_size": None, "nb_classes": 3,
                "global_pool": False}  # fmt: skip
    model = build_probe(settings).train()
    assert model.training
    assert model.head[0].training
    assert not any(module.training for module in model.blocks.modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    assert not model.forward_features(torch.rand(2, 1, 16, 16)).requires_grad


@pytest.mark.parametrize("cached", [False, True])
def test_several_rates_train_heads_that_do_not_mind_each_other(probe, tuned, cached):
    """The head of a rate is that of a run with this rate alone, on the same images."""
    flags = {"finetune": tuned / "checkpoint-19.pth", "epochs": 3, **({"cache_features": True} if cached else {})}
    out = probe("several", blr="1 30 100", **flags)
    chosen = lines(out)[-1]["chosen_blr"]
    assert chosen in (1, 30, 100)
    written = checkpoint.read(out / "probe.pth")
    assert written["args"]["blr"] == chosen
    assert written["model"]["head.1.weight"].shape == (6, 128)
    all_heads = checkpoint.read(out / "checkpoint-2.pth")["model"]
    number = [1, 30, 100].index(chosen)
    assert torch.equal(all_heads[f"head.{number}.1.weight"], written["model"]["head.1.weight"])


def test_the_written_probe_evaluates_alike(probe, tuned, capsys):
    out = probe("several", blr="1 100", finetune=tuned / "checkpoint-19.pth", epochs=3)
    last = lines(out)[-1]
    capsys.readouterr()
    probe("nothing", eval=True, resume=out / "probe.pth")
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5" in capsys.readouterr().out


def test_resumes_exactly(probe, tuned):
    flags = {"finetune": tuned / "checkpoint-19.pth", "lr": 5}
    whole = probe("whole", **flags, epochs=4)
    probe("parts", **flags, epochs=4)
    (whole.parent / "parts" / "checkpoint-3.pth").unlink()
    (whole.parent / "parts" / "checkpoint-best.pth").unlink()
    parts = probe("parts", **flags, epochs=4, resume="auto")
    a, b = (checkpoint.read(out / "checkpoint-3.pth") for out in (whole, parts))
    assert torch.equal(a["model"]["head.1.weight"], b["model"]["head.1.weight"])
    assert torch.equal(a["optimizer"]["state"][0]["momentum"], b["optimizer"]["state"][0]["momentum"])
