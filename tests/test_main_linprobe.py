"""Linear probing: the encoder is frozen, heads train independently, and the test set selects nothing."""

import json
import subprocess

import pytest
import torch
from conftest import ROOT, torchrun
from torch.nn import functional as F

import main_finetune
import main_linprobe
import models_build
from models_build import ParallelHeads, probe_head
from util.checkpoints import checkpoint
from util.cli import entry_point


@pytest.fixture
def probe(classify):
    return lambda name="run", **flags: classify(main_linprobe, name, **flags)


def lines(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


@pytest.fixture
def tuned(classify):
    """A fine-tuned encoder."""
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
    model = models_build.probe(settings).train()
    assert model.training
    assert model.head[0].training
    assert not any(module.training for module in model.blocks.modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    assert not model.forward_features(torch.rand(2, 1, 16, 16)).requires_grad


def test_heads_train_independently():
    """The gradient of each head equals that of a single head."""
    torch.manual_seed(0)
    features, targets = torch.randn(16, 8), torch.randint(0, 3, (16,))
    first, second = probe_head(8, 3), probe_head(8, 3)
    for head in (first, second):
        main_linprobe.HeadLosses(1)(head(features), targets).backward()
    alone = [head[1].weight.grad.clone() for head in (first, second)]
    together = ParallelHeads([first, second])
    together.zero_grad()
    main_linprobe.HeadLosses(1)(together(features), targets).backward()
    for head, gradient in zip(together, alone, strict=True):
        torch.testing.assert_close(head[1].weight.grad, gradient)


@pytest.mark.parametrize("cached", [False, True])
def test_the_best_of_several_rates_is_selected(probe, tuned, cached):
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


def test_the_loss_is_the_mean_and_each_head_records_its_own():
    torch.manual_seed(0)
    criterion, logits, targets = main_linprobe.HeadLosses(2), torch.randn(3, 2, 5, 4), torch.randint(0, 4, (5,))
    own = [[float(F.cross_entropy(head, targets)) for head in batch] for batch in logits]
    for batch, losses in zip(logits, own, strict=True):
        assert float(criterion(batch, targets)) == pytest.approx(sum(losses) / 2)
    assert criterion.means() == pytest.approx([(own[1][n] + own[2][n]) / 2 for n in range(2)])  # of the last epoch
    assert criterion.means() == []
    criterion(logits[0], targets)
    criterion(logits[1] * float("nan"), targets)
    assert criterion.means() == pytest.approx(own[0])


def test_the_selected_rate_and_its_loss_are_logged(probe, tuned, capsys):
    flags = {"finetune": tuned / "checkpoint-19.pth", "epochs": 2, "cache_features": True}
    out = probe("several", blr="1 30 100", **flags)
    said, last = capsys.readouterr().out, lines(out)[-1]
    loss = f"{last['train_loss']:.4f}"
    assert f"best of 3 rates: --blr {last['chosen_blr']:g}, held-out Acc@1 " in said
    assert f", training loss {loss}\n" in said
    assert f"loss {loss}," in said[said.index("epoch 1 done in") :]


@pytest.mark.parametrize(
    ("best", "warned"), [(0, ["the smallest"]), (1, []), (2, ["the largest"])], ids=["smallest", "inner", "largest"]
)
def test_a_selected_rate_at_the_limit_warns(caplog, best, warned):
    accuracies = [50.0 + (number == best) for number in range(3)]
    entries = main_linprobe.report_best_rate([0.1, 1.0, 10.0], accuracies, [3.0, 2.0, 1.0], is_last=True)
    assert entries == {"chosen_blr": [0.1, 1.0, 10.0][best], "train_loss": [3.0, 2.0, 1.0][best]}
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.split(", ")[1].removesuffix(" value") for message in warnings] == warned
    caplog.clear()
    main_linprobe.report_best_rate([0.1, 1.0, 10.0], accuracies, [], is_last=False)
    assert not any(record.levelname == "WARNING" for record in caplog.records)


def test_two_processes_evaluate_the_saved_probe(tuned, labelled, tmp_path, capsys, probe):
    """In training, each process has its own statistics of batch norm."""
    subprocess.run(
        [*torchrun(2), "main_linprobe.py", "--data_path", labelled, "--output_dir", tmp_path / "two", "--model",
         "vit_mini_patch4", "--input_size", "16", "--batch_size", "4", "--epochs", "3", "--warmup_epochs", "1", "--lr",
         "3", "--num_workers", "0", "--device", "cpu", "--finetune", tuned / "checkpoint-19.pth"],
        cwd=ROOT, check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    last = lines(tmp_path / "two")[-1]
    capsys.readouterr()
    probe("nothing", eval=True, resume=tmp_path / "two" / "checkpoint-2.pth")
    said = capsys.readouterr().out
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}" in said


def test_the_saved_probe_gives_equal_results(probe, tuned, capsys):
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


def test_evaluation_uses_the_recorded_settings(probe, tuned, capsys, labelled):
    out = probe("run", finetune=tuned / "checkpoint-19.pth", lr=5, epochs=3, crop_pct=1, mean="0.4 0.4 0.4")
    last = lines(out)[-1]
    capsys.readouterr()
    flags = ["--eval", "--resume", out / "checkpoint-2.pth", "--data_path", labelled, "--num_workers", 0]
    main_linprobe.main(entry_point.parse(main_linprobe.get_args_parser(), [*map(str, flags), "--device", "cpu"]))
    said = capsys.readouterr().out
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}" in said
    assert "warning" not in said


def test_without_finetune_features_are_random_or_of_the_checkpoint(probe, tuned, capsys):
    """The checkpoint of a probe contains the encoder, which computes the features, with or without --finetune."""
    flags = {"lr": 5, "epochs": 4}
    probe("random", **flags)
    assert capsys.readouterr().out.count("warning: no --finetune: the features are from an untrained encoder") == 1
    whole = probe("whole", finetune=tuned / "checkpoint-19.pth", **flags)
    capsys.readouterr()
    again = probe("again", resume=whole / "checkpoint-1.pth", **flags)
    assert "untrained encoder" not in capsys.readouterr().out
    assert lines(again)[-1]["test_acc1"] == lines(whole)[-1]["test_acc1"]
    assert lines(again)[-1]["test_loss"] == lines(whole)[-1]["test_loss"]
