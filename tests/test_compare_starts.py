"""Which start is best: an encoder of DINOv2, the same continued, random weights, or pixels."""

import re
import shutil

import pytest
from mains import Stopped, call, fails, stop_after
from test_dino import of_transformers
from test_main_compare import recorded, rows, untimed

import main_compare
import main_pretrain
from mae.compare.predictors import BASELINES
from mae.settings.choices import CLASSIFICATION

pytestmark = pytest.mark.usefixtures("forked")
WIDTH = 128  # of `test_dino.SIZES`, with 2 blocks
BASE = {"num_workers": 0, "device": "cpu", "amp": "off"}


@pytest.fixture(scope="module")
def starts(tmp_path_factory, pictures):
    """A folder with an encoder of DINOv2, and a checkpoint that continued it with updates of rank 2."""
    folder = tmp_path_factory.mktemp("starts")
    of_transformers("v2", folder / "dinov2-small")
    call(main_pretrain, "--init_from", folder / "dinov2-small", "--lora", 2, "--input_size", 32, data_path=pictures,
         output_dir=folder / "continued", epochs=1, warmup_epochs=0, batch_size=8, blr=0.1, **BASE)  # fmt: skip
    return folder


def compare(labelled, starts, out, *more):
    return call(main_compare, *words_of(labelled, starts, out, *more))


def words_of(labelled, starts, out, *more):
    continued = f"continued={starts / 'continued/checkpoint-0.pth'}"
    words = ["--encoders", starts / "dinov2-small", continued, "scratch", "pixels", "--protocols", "knn", "lora",
             "finetune", "--labels", 12, "all", "--draws", 1, "--budget", 1, "--data_path", labelled,
             "--output_dir", out, *more]  # fmt: skip
    return [*words, *(word for name, value in BASE.items() for word in (f"--{name}", value))]


@pytest.fixture(scope="module")
def compared(labelled, starts, forked, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return out, compare(labelled, starts, out, "--keep_checkpoints")


@pytest.mark.slow
def test_the_table_has_each_start_and_its_costs(compared, starts):
    out, text = compared
    found = {(row["encoder"], row["protocol"], row["labels"]): row for row in rows(out)}
    starts_and_scratch = [(name, protocol) for name in ("dinov2-small", "continued", "scratch")
                          for protocol in ("k-NN", "LoRA", "fine-tuned")]  # fmt: skip
    baselines = {("pixels", each.title) for each in BASELINES[CLASSIFICATION]}
    named = {*starts_and_scratch, *baselines} - {("scratch", "LoRA")}
    assert found.keys() == {(*key, labels) for key in named for labels in ("12", "48")}
    assert text == (out / "table.md").read_text()
    assert re.search(
        r"^\|.*\| 12 labels \| 48 labels \| trained parameters \| seconds \(12 / 48 labels\) \|$", text, re.M
    )
    for name, protocol in named:
        assert re.search(rf"^\| {name} \({protocol}\) \| .*\d \|$", text, re.MULTILINE)
    assert re.search(r"^\| scratch \(LoRA\) \| – \| – \| – \| – \|$", text, re.MULTILINE)
    assert "scratch (LoRA) is left out" in text

    head_and_norm = 6 * WIDTH + 6 + 2 * WIDTH
    of_block = 12 * WIDTH**2 + 13 * WIDTH + 2 * WIDTH  # matrices, biases and norms; two layer scales
    of_image = 8 * 8 * 3 * WIDTH + WIDTH + WIDTH + 17 * WIDTH  # patches, class token, positions
    trained = {"k-NN": 0, "LoRA": 2 * 2 * 2 * 8 * WIDTH + head_and_norm,
               "fine-tuned": of_image + 2 * of_block + head_and_norm}  # fmt: skip
    for (name, protocol, _), row in found.items():
        assert row["trained_parameters"] == ("" if name == "pixels" else str(trained[protocol]))
        assert float(row["seconds"]) > 0


@pytest.mark.slow
def test_updates_of_a_start_are_merged_and_all_starts_have_the_same_settings(compared):
    out, _ = compared
    for protocol, rank in (("lora", 8), ("finetune", 0)):
        names = ("lr", "blr", "layer_decay", "batch_size", "epochs", "encoder", "encoder_args", "seed", "input_size")
        dino, continued = (
            recorded(out / f"runs/{name}/{protocol}/12/0/checkpoint-0.pth") for name in ("dinov2-small", "continued")
        )
        assert {name: dino[name] for name in names} == {name: continued[name] for name in names}
        assert continued["lora"] == rank and (dino["lora"] or 0) == rank
        assert (dino["blr"], dino["layer_decay"]) == {"lora": (1e-2, 1), "finetune": (1e-3, 0.75)}[protocol]
    assert not recorded(out / "runs/scratch/finetune/12/0/checkpoint-0.pth")["lora"]


@pytest.mark.slow
def test_a_comparison_that_was_killed_gives_the_same_table(compared, labelled, starts, tmp_path, monkeypatch):
    """In its second training with updates. The results of earlier ones are not computed again."""
    whole, text = compared
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/continued")
    more = ("--keep_checkpoints",)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 2)
        compare(labelled, starts, tmp_path, *more)
    assert (tmp_path / "runs/continued/lora/48/0/run.json").exists()
    before = {path: path.read_text() for path in tmp_path.glob("runs/**/run.json") if '"scores"' in path.read_text()}
    assert untimed(compare(labelled, starts, tmp_path, *more)) == untimed(text)
    assert {path: path.read_text() for path in before} == before
    without = {"seconds": "", "command": ""}
    assert [row | without for row in rows(tmp_path)] == [row | without for row in rows(whole)]


@pytest.mark.slow
def test_rates_of_updates_are_chosen_and_flags_and_recipes_give_the_rank(labelled, starts, tmp_path):
    (tmp_path / "lora.yaml").write_text("lora: 3\nlora_alpha: 6\nbatch_size: 16\nblr: 0.5\n")
    flags = ("--labels", "all", "--draws", 1, "--protocols", "lora", "--keep_checkpoints", "--encoders",
             starts / "dinov2-small")  # fmt: skip
    recipe = ("--recipes", f"lora={tmp_path / 'lora.yaml'}")
    for name, more, expected in (
        ("recipe", recipe, {"lora": 3, "lora_alpha": 6, "blr": 0.5}),
        ("flag", (*recipe, "--lora", 5), {"lora": 5, "lora_alpha": 6, "blr": 0.5}),
        ("rates", ("--blr", "1e-4", "2e-4", "--lora_alpha", 16), {"lora": 8, "lora_alpha": 16}),
    ):
        compare(labelled, starts, tmp_path / name, *flags, *more)
        (row,) = rows(tmp_path / name)
        args = recorded(tmp_path / name / "runs/dinov2-small/lora/48/0/checkpoint-0.pth")
        assert {key: args[key] for key in expected} == expected
        assert row["chosen"] == (f"blr {args['blr']:g}" if name == "rates" else "")
    tried = {path.name for path in (tmp_path / "rates/runs/choices/dinov2-small/lora/48/0").iterdir() if path.is_dir()}
    assert {"0.001", "0.002"} <= tried and not list((tmp_path / "rates").glob("runs/choices/**/0.0001"))


BLOCKS = """
from torch import nn
from models_vit import Block, Encoder

class Mixer(nn.Module):
    def __init__(self, dim, *args, **options):
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x, **context):
        return self.mix(x)

class Own(Encoder):
    block = Mixer
"""


def test_what_has_no_updates_is_found_before_the_first_run(labelled, starts, tmp_path, capsys, monkeypatch, own_module):
    """Random weights, and blocks of the user's code without the layer."""
    own_module("own_blocks", BLOCKS)
    words = words_of(labelled, starts, tmp_path, "--encoders", "scratch", "--protocols", "lora")
    own = {"encoder": "own_blocks:Own", "model": "mae_vit_mini_patch4", "input_size": 16}
    call(main_pretrain, data_path=labelled / "train", output_dir=tmp_path / "own", epochs=1, warmup_epochs=0,
         batch_size=8, **own, **BASE)  # fmt: skip
    text = compare(labelled, starts, tmp_path / "out", "--encoders", tmp_path / "own/checkpoint-0.pth", "--encoder",
                   own["encoder"], "--labels", "all", "--draws", 1, "--protocols", "knn", "lora")  # fmt: skip
    assert re.search(r"^\| checkpoint-0 \(LoRA\) \| – \|", text, re.MULTILINE)
    assert re.search(r"checkpoint-0 \(LoRA\) is left out: .*class Mixer have no linear layer attn.qkv", text)
    line = fails(capsys, monkeypatch, main_compare, *words)
    assert re.search(r"protocols=lora: scratch: .*random weights", line)
    assert not list((tmp_path / "runs").glob("*"))
