"""Choices by name: a function and a line in a registry are enough for a new one."""

from argparse import Namespace

import pytest
import torch
from mains import lines, open_source, parse

import main_finetune
import main_linprobe
import main_pretrain
from mae.cli.options import REGISTRIES, registry_of
from mae.data.kinds.registry import KINDS, Kind
from mae.inference import get_model
from mae.inference.export import export
from mae.masking import MASKING
from mae.probes import PROBES, Probe
from mae.registry import Choice, find
from mae.training import lr_sched, optimizers
from mae.training.lr_sched import SCHEDULES
from mae.training.optimizers import OPTIMIZERS


def sgd(model, groups, betas):
    return torch.optim.SGD(groups, lr=0.0, momentum=betas[0])


def fixed(grid_size, mask_ratio):
    noise = torch.arange(float(grid_size[0] * grid_size[1]))
    return noise.clone, mask_ratio


def test_new_names_train(pretrain, monkeypatch):
    """Their names are the values of the flags, and are recorded."""
    for name, registry, function in (
        ("sgd", OPTIMIZERS, sgd), ("constant", SCHEDULES, lambda progress: 1.0), ("fixed", MASKING, fixed)
    ):  # fmt: skip
        monkeypatch.setitem(registry, name, Choice("a planted choice", function))
    assert main_pretrain.get_args_parser().format_help().count("a planted choice") == 3
    flags = {"optimizer": "sgd", "lr_schedule": "constant", "masking": "fixed"}
    out = pretrain(**flags, warmup_epochs=0, lr=0.1)
    assert [line["train_lr"] for line in lines(out)] == pytest.approx([0.1, 0.1])
    state = torch.load(out / "checkpoint-1.pth", weights_only=False)
    assert state["args"].items() >= flags.items()
    assert "momentum" in state["optimizer"]["param_groups"][0]


def test_the_first_name_is_not_the_default(monkeypatch):
    """None, which files record for the default, keeps its meaning."""
    monkeypatch.setattr(lr_sched, "SCHEDULES", {"constant": Choice("", lambda progress: 1.0), **SCHEDULES})
    monkeypatch.setattr(optimizers, "OPTIMIZERS", {"sgd": Choice("", sgd), **OPTIMIZERS})
    run = parse(main_pretrain, lr_schedule="constant", optimizer="sgd").optim
    assert (run.lr_schedule, run.optimizer) == ("constant", "sgd")
    run = parse(main_pretrain, lr_schedule="cosine", optimizer="adamw").optim
    assert (run.lr_schedule, run.optimizer) == (None, None)
    model = torch.nn.Linear(2, 2)
    built = optimizers.build(None, None, model, [{"params": [*model.parameters()]}])
    assert isinstance(built, torch.optim.AdamW)
    assert lr_sched.adjust_learning_rate(built, 10, parse(main_pretrain, epochs=10, lr=1, warmup_epochs=0).optim) == 0


@pytest.mark.parametrize("setting", REGISTRIES)
def test_an_unknown_name_is_refused_where_it_is_used(setting):
    registry = registry_of(setting)
    first = next(iter(registry))
    assert find(setting, registry, first) == registry[first]
    with pytest.raises(ValueError, match=f"{setting}={first}x: give one of {first}.*; did you mean {first}?"):
        find(setting, registry, f"{first}x")


def test_an_unknown_schedule_of_a_program_ends_before_the_first_update(pictures, tmp_path):
    updates = []

    class Update:
        def after_update(self, model, epoch):
            updates.append(epoch)

        def state_dict(self):
            return {}

    args = Namespace(
        data_path=str(pictures), output_dir=str(tmp_path), model="mae_vit_mini_patch4", input_size=16, batch_size=4,
        warmup_epochs=1, num_workers=0, device="cpu", lr_schedule="cosin",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"lr_schedule=cosin.*did you mean cosine"):
        main_pretrain.main(args, callbacks=[Update()])
    assert updates == []


def test_a_recipe_may_have_names_and_no_code(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer: muon\nlr_schedule: cosine\n")
    run = parse(main_pretrain, config=recipe).optim
    assert (run.optimizer, run.lr_schedule) == ("muon", None)  # None: the default
    for script, text in (
        (main_pretrain, "optimizer: own:function"), (main_pretrain, "lr_schedule: own:function"),
        (main_finetune, "metric: [accuracy, own:function]"),
    ):  # fmt: skip
        recipe.write_text(text)
        with pytest.raises(SystemExit):
            parse(script, config=recipe)
        assert f"must not set {text.partition(':')[0]}" in capsys.readouterr().err


def test_a_new_probe_trains_and_is_evaluated(classify, monkeypatch):
    """A head of two layers. Files record its name, and other libraries do not get it."""

    def two_layers(embed_dim, spec):
        return torch.nn.Sequential(torch.nn.Linear(embed_dim, 8), torch.nn.ReLU(), torch.nn.Linear(8, spec.nb_classes))

    monkeypatch.setitem(PROBES, "deep", Probe("two layers", two_layers))
    out = classify(main_linprobe, probe="deep", epochs=1)
    file = out / "checkpoint-0.pth"
    state = torch.load(file, weights_only=False)
    assert state["args"]["probe"] == "deep"
    assert state["model"]["head.0.weight"].shape[0] == 8
    classify(main_linprobe, eval=True, resume=file)
    model = get_model(file)
    assert model.head[0].out_features == 8
    with pytest.raises(ValueError, match="to=timm: the format has no deep probe"):
        export(model, "timm", out / "timm")


def test_a_new_kind_of_dataset_trains(pretrain, monkeypatch, capsys):
    def open_dataset(name, split, data, task, function):
        return open_source(split, f"{data.data_path}/{name}")

    monkeypatch.setitem(KINDS, "inner", Kind("FOLDER, planted", open_dataset, uses=("data_path",)))
    assert "inner:FOLDER, planted" in " ".join(main_pretrain.get_args_parser().format_help().split())
    assert len(lines(pretrain(dataset="inner:train", epochs=1, num_images=5))) == 1
    output = capsys.readouterr().out
    assert "`num_images` has no effect" in output
    assert "`data_path` has no effect" not in output
