"""The benchmarks run on the smallest sizes, and count FLOPs with the rules of the field."""

import csv
import itertools
import json
import math
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT
from mains import lines
from PIL import Image
from test_attention import saved_bytes

import main_pretrain
import models_mae
import models_vit
from benchmarks import (
    evaluation,
    image_sets,
    input_pipeline,
    leaderboard,
    lean,
    letters,
    machine,
    model_table,
    peers,
    records,
    scoring,
    start_from,
    train_step,
)
from mae.cli.script import Script
from models_vit import SIZES


def test_operations_by_hand():
    for size, giga in (("base_patch16", 58.46), ("large_patch16", 124.23), ("huge_patch14", 290.99)):
        assert model_table.training_flops(size) / 1e9 == pytest.approx(giga, abs=0.01)
    assert model_table.classifier_flops("base_patch16") / 2e9 == pytest.approx(17.56, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["mini_patch4", "base_patch16", "giant_patch14"])
def test_operations_are_those_of_the_models(size):
    """The table counts the layer norms too, at most 1 %. The MLP ratio of the giant model adds 6 %."""
    row = model_table.measure(size, peers.image_side(size))
    assert model_table.classifier_flops(size) / 2 == pytest.approx(row["all_tokens"], rel=0.01)
    projection = 3 * peers.image_side(size) ** 2 * SIZES[size]["embed_dim"]  # of patches: pixels need no gradient
    assert (model_table.training_flops(size) / 2 + projection) / 3 == pytest.approx(row["masked"], rel=0.01)


@pytest.mark.parametrize("size", ["mini_patch4", "giant_patch14"])
def test_peers_have_our_parameters(size):
    def count(build, *args, **kwargs):
        with torch.device("meta"):
            return sum(p.numel() for p in build(*args, **kwargs).parameters())

    ours = count(getattr(models_mae, f"mae_vit_{size}"))
    for build in (peers.PlainMAE, peers.transformers_mae):
        assert count(build, size) == ours
    vit = getattr(models_vit, f"vit_{size}")
    assert count(peers.timm_classifier, size) == count(vit, global_pool=True)
    assert count(peers.transformers_encoder, size) == count(vit, num_classes=0)


def test_the_lean_loop_has_the_method_of_the_recipe():
    """Its loss is that of our model with the same weights and noise."""
    names = {
        "patch_embed.proj.": "embed.", "decoder_embed.": "decoder_embed.", "decoder_pred.": "predict.",
        "cls_token": "cls_token", "mask_token": "mask_token", "decoder_blocks.0.": "decoder.0.",
        "decoder_norm.": "decoder.1.", "blocks.": "blocks.", "norm.": "blocks.4.",
    }  # fmt: skip
    recipe = yaml.safe_load((ROOT / "recipes/pretrain_fashion_mnist.yaml").read_text())
    settings = {name: recipe[name] for name in ("patch_size", "in_chans", "norm_pix_loss", "uniformity")}
    model = models_mae.mae_vit_mini_patch4(img_size=recipe["input_size"], **settings)
    weights = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            prefix = next(prefix for prefix in names if name.startswith(prefix))
            new = (names[prefix] + name.removeprefix(prefix)).replace(".attn.", ".")
            weights[new.replace("fc1", "0").replace("fc2", "2")] = weight.flatten(1) if weight.ndim > 3 else weight
    theirs = lean.Autoencoder()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (set(missing), unexpected) == ({"positions", "decoder_positions"}, [])
    images = torch.randn(6, 1, 28, 28)
    noise = torch.rand(6, 16, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    expected = sum(model(images, recipe["mask_ratio"], noise=noise)[0].values())
    torch.testing.assert_close(theirs(images[:, 0]), expected, rtol=1e-5, atol=0)


def run(script, out, *argv):
    """Runs a benchmark on the smallest sizes; returns the only file that it writes."""
    argv = [*argv, "--rounds", "1", "--device", "cpu", "--out", str(out)]
    script.main(script.get_args_parser().parse_args(argv))
    (file,) = out.glob("*.json")
    return json.loads(file.read_text())


SMALL = ("--size", "mini_patch4", "--batch_size", "2", "--amp", "off")


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_steps_are_timed(task, tmp_path, capsys):
    peer = "transformers eager" if task == "pretrain" else "timm eager"
    found = run(train_step, tmp_path, "--task", task, *SMALL, "--only", peer, "ours eager")
    assert found["machine"]["torch"] == torch.__version__
    assert found["images_per_second"].keys() == {peer, "ours eager"}
    assert f"| ours eager | {found['images_per_second']['ours eager']:.2f} |" in capsys.readouterr().out


def test_an_unknown_implementation_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--only nobody.*ours eager"):
        run(train_step, tmp_path, "--only", "nobody")


def test_our_model_saves_the_fewest_bytes_for_the_backward_pass():
    """With the fused attention kernel, as on a GPU."""
    images = torch.rand(2, 3, 32, 32)
    with patch.object(models_vit, "attend", F.scaled_dot_product_attention):
        saved = {
            name: saved_bytes(build("mini_patch4"), images) for name, build in train_step.MODELS["pretrain"].items()
        }
    assert 0 < saved["ours"] < min(saved["plain"], saved["transformers"])


@pytest.mark.slow
def test_batches_are_timed_and_compared(tmp_path):
    image_sets.write_jpeg_files(tmp_path, 130)
    for batches in (input_pipeline.classic(tmp_path), input_pipeline.ours(tmp_path, fast_jpeg=True)):
        assert input_pipeline.rate(batches, 1) > 0
    assert input_pipeline.differences(tmp_path)["0"] > 0.99


@pytest.mark.parametrize(("task", "peer"), [("eval", "timm"), ("features", "transformers")])
def test_passes_over_files_are_timed(task, peer, tmp_path, capsys):
    rates = run(evaluation, tmp_path, "--task", task, *SMALL, "--images", "6", "--num_workers", "0",
                "--only", f"{peer} eager", "ours eager")["images_per_second"]  # fmt: skip
    assert rates.keys() == {f"{peer} eager", "ours eager", "ours eager, --fast_jpeg"}
    assert min(rates.values()) > 0
    assert f"| ours eager | {rates['ours eager']:.2f} |" in capsys.readouterr().out


def test_files_beyond_the_different_ones_are_links(tmp_path):
    image_sets.write_jpeg_files(tmp_path, 7, num_different=3)
    files = sorted((tmp_path / "train" / "photograph").iterdir())
    assert [file.is_symlink() for file in files] == [False] * 3 + [True] * 4
    assert files[4].read_bytes() == files[1].read_bytes()


def write_two_classes(folder):
    """Writes dark and bright images of noise: 70 of each to train/, 5 to val/."""
    draw = np.random.default_rng(0)
    for (split, count), label in itertools.product({"train": 70, "val": 5}.items(), range(2)):
        (folder / split / str(label)).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 128, (28, 28)) + 127 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / split / str(label) / f"{number}.png")


def test_an_entry_has_a_row_for_each_set_of_images(tmp_path, monkeypatch):
    """The page and the board have it, too."""
    write_two_classes(tmp_path / "images")
    for name in ("ROWS", "PAGE", "BOARD"):
        monkeypatch.setattr(leaderboard, name, tmp_path / name)
    monkeypatch.setattr(scoring, "LABELS", 80)
    leaderboard.ROWS.touch()
    leaderboard.PAGE.write_text("<!-- python benchmarks/leaderboard.py -->\n<!-- end -->\n")
    argv = [leaderboard.PIXELS, "--test", "--data_path", str(tmp_path / "images")]
    leaderboard.main(leaderboard.get_args_parser().parse_args(argv))
    held_out, test = leaderboard.read()
    assert (held_out["evaluated on"], held_out["evaluated images"]) == ("held-out", 28)
    assert (test["evaluated on"], test["500 labels"]) == ("test", 100)
    assert leaderboard.table() in leaderboard.PAGE.read_text()
    assert json.loads(leaderboard.BOARD.read_text()) == []  # of encoders


def test_entries_are_evaluated_on_a_fifth_of_each_class(tmp_path):
    for name in ("a", "b"):
        for number in range(10):
            path = tmp_path / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    flags = scoring.hold_out(tmp_path, tmp_path)
    (train, of_train), (held_out, of_held_out) = (
        zip(*([row["path"], row["label"]] for row in csv.DictReader(path.open())), strict=True)
        for path in flags.values()
    )
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(map(str, tmp_path.glob("train/*/*")))
    assert Counter(of_held_out) == {"a": 2, "b": 2}
    assert Counter(of_train) == {"a": 8, "b": 8}


def test_entries_are_evaluated_on_images_that_are_not_pre_trained_on(tmp_path):
    """The larger dataset has other names for the same files; it is told apart by the pixels."""
    draw = np.random.default_rng(0)
    every = [Image.fromarray(draw.integers(0, 255, (4, 4), dtype=np.uint8)) for _ in range(16)]
    for folder, numbers in {"few/train/a": range(8), "all/train/a": range(12), "all/val/a": range(12, 16)}.items():
        (tmp_path / folder).mkdir(parents=True)
        for position, number in enumerate(numbers):
            every[number].save(tmp_path / folder / f"{len(numbers) - position:02}.png")
    sets = scoring.other_images(tmp_path / "few", tmp_path / "all", tmp_path)
    found = {
        name: [{row["path"] for row in csv.DictReader(path.open())} for path in flags.values()]
        for name, flags in sets.items()
    }
    few, others, tests = (
        set(map(str, tmp_path.glob(pattern))) for pattern in ("few/*/*/*", "all/train/a/*", "all/val/*/*")
    )
    assert found[scoring.TEST] == [few, tests]
    assert found[scoring.OTHERS] == [few, {str(tmp_path / f"all/train/a/{number:02}.png") for number in (1, 2, 3, 4)}]
    assert found[scoring.OTHERS][1] < others
    assert [scoring.count(flags["val_list"]) for flags in sets.values()] == [4, 4]
    assert scoring.standard_error([80.0, 80.0], 10_000) == pytest.approx(0.4)


def test_a_repeated_run_is_compared_with_the_earlier_rows_of_its_entry_and_machine():
    scores = np.random.default_rng(0).normal(80, 0.5, (1000, 5))
    bounds = np.array([leaderboard.prediction_interval(list(earlier)) for *earlier, _ in scores])
    within = (bounds[:, 0] <= scores[:, -1]) & (scores[:, -1] <= bounds[:, 1])
    assert within.mean() == pytest.approx(0.95, abs=0.02)
    row = {"entry": "muon", "budget": 5.0, "images": 9, "kind": "images", "evaluated on": "test", "machine": "A"}
    rows = [{**row, "score": score} for score in (79.9, 80.0, 80.1)] + [{**row, "machine": "B", "score": 60.0}]
    assert "within" in leaderboard.agreement({**row, "score": 80.2}, rows)
    assert "OUTSIDE" in leaderboard.agreement({**row, "score": 81.0}, rows)
    assert "within" not in leaderboard.agreement({**row, "machine": "B", "score": 60.0}, rows)


def test_a_record_needs_a_gain_that_is_not_chance():
    difference, low, high, p = records.compare([82.0, 82.3, 82.4], [80.9, 81.0, 81.3])
    assert (round(difference, 2), p < records.LEVEL) == (1.17, True)
    assert low < difference < high


def test_entries_are_compared_by_runs_that_alternated_on_one_machine():
    """The rows of a test are of the same seeds and commit. The other rows are of other machines or of other days."""

    def rows_of(commit, *scores):
        return [{"score": score, "seed": seed, "commit": commit} for seed, score in enumerate(scores)]

    rows = {
        ("new", "A"): rows_of("c1", 82.0, 82.2, 82.4),
        ("old", "A"): rows_of("c1", 81.0, 81.2, 81.1, 99.0) + rows_of("c0", 99.0, 99.0, 99.0),
        ("old", "B"): rows_of("c1", 79.0, 79.2, 79.1),
        ("new", "B"): rows_of("c2", 81.0, 81.2, 81.1),
    }
    found = records.tests("new", "old", rows)
    assert [*found] == ["A"]
    assert found["A"][0] == pytest.approx(1.1)


def test_rows_at_equal_updates_are_compared_over_machines(tmp_path, monkeypatch, capsys):
    """Of two machines with two seeds each; such a gain is no record."""
    monkeypatch.setattr(leaderboard, "ROWS", tmp_path / "rows.jsonl")
    shared = {"kind": records.TRACK["kind"], "budget": "50 epochs", "evaluated on": "held-out"}
    rows = [
        {
            **shared,
            "entry": entry,
            "seed": seed,
            "machine": "AABB"[seed],
            "commit": "1122"[seed],
            "score": score + seed / 9,
        }
        for seed in range(4)
        for entry, score in (("new", 82.0), (records.RECORDS[-1], 80.0))
    ]
    leaderboard.ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records.main(records.get_args_parser().parse_args(["new", records.RECORDS[-1], "--epochs", "50"]))
    text = capsys.readouterr().out
    assert "all machines, 4 seed(s)" in text and "score +2.00" in text and text.strip().endswith(": better")


def test_correlations_are_those_of_entries_and_of_seeds():
    """A measure that ranks the entries, and is random between the seeds of an entry. Losses need normalized pixels."""
    draw = np.random.default_rng(0)
    rows = {
        (f"entry {mean}", "A"): [
            {"score": mean + draw.normal(0, 0.1), "test_loss": -mean + draw.normal(0, 0.1), "test_effective_rank": 1.0,
             "test_uniformity": mean, "command": f"--{'' if mean > 70 else 'no_'}norm_pix_loss"}
            for _ in range(40)
        ] for mean in range(70, 80)
    }  # fmt: skip
    cells, *_, others = (line.strip("| ").split(" | ") for line in records.correlations(rows).splitlines()[2:])
    assert (cells[:3], others[:3]) == (["test_loss", "-1.00", "9"], ["test_uniformity", "1.00", "10"])
    assert abs(float(cells[3])) < 0.2


@pytest.mark.slow
def test_an_encoder_is_adapted_and_distilled(tmp_path, monkeypatch):
    """The table has a row for each way, with the weights that it trains, and the page has the table."""
    write_two_classes(tmp_path / "images")

    def pretrain(flags, out, epochs):
        out.parent.mkdir(exist_ok=True)
        script = Script(main_pretrain)
        script.call_main({**flags, "epochs": epochs, "save_every": epochs, "output_dir": out}, out.with_suffix(".txt"))
        return lines(out)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(leaderboard, "pretrain", pretrain)  # in one process
    monkeypatch.setattr(scoring, "LABELS", 80)
    monkeypatch.setattr(leaderboard, "TOLERANCE", math.inf)
    monkeypatch.setattr(scoring, "DRAWS", 2)
    for _, flags in start_from.WAYS.values():
        for name, value in {"epochs": 1, "warmup_epochs": 0}.items():
            monkeypatch.setitem(flags, name, value)
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(start_from, "PAGE", tmp_path / "page.md")
    start_from.PAGE.write_text("<!-- python benchmarks/start_from.py -->\n<!-- end -->\n")
    argv = ["--data_path", tmp_path / "images", "--minutes", 0.001, "--student_minutes", 0.001]
    start_from.main(start_from.get_args_parser().parse_args(list(map(str, argv))))
    (file,) = (tmp_path / "results").glob("*/start_from_fashion_mnist.json")
    found = json.loads(file.read_text())
    weights = {name: row["weights"] for name, row in found["adapted"].items()}
    assert [*weights] == [*start_from.WAYS]
    above = 2 * 128 + 2 * (128 + 1)  # norm and head
    assert weights["LoRA of rank 4"] == 4 * 2 * 2 * 4 * 128 + above
    assert weights["LoRA of rank 16"] == 4 * 2 * 2 * 16 * 128 + above
    assert weights["frozen, with a linear head"] == 2 * (128 + 1)
    full, *students = (row["weights"] for row in found["encoders"].values())
    assert full == weights["fine-tuned in full"]
    assert students[0] == students[1] < 0.3 * full
    assert all(len(row["accuracies"]) == 2 for row in (*found["adapted"].values(), *found["encoders"].values()))
    rows = start_from.PAGE.read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows if row.startswith("| student")] == [
        "| student, distilled from it", "| student, pre-trained alone"
    ]  # fmt: skip


def test_letters_are_rendered_from_a_font():
    try:
        files = letters.fonts("fonts-dejavu-core")
    except ValueError:
        pytest.skip("fonts-dejavu-core is not installed")
    images = dict(letters.glyphs(files[0]))
    assert len(images) == 62
    assert {image.size for image in images.values()} == {(28, 28)}
    assert len({image.tobytes() for image in images.values()}) == 62
    assert not set(letters.PACKAGES["train"]) & set(letters.PACKAGES["val"])


def test_missing_fonts_are_an_error():
    with pytest.raises(ValueError, match="fonts-of-nobody"):
        letters.fonts("fonts-of-nobody")


def test_the_board_of_the_recipes_is_that_of_the_rows():
    assert leaderboard.BOARD.read_text() == leaderboard.board_of(leaderboard.read())
