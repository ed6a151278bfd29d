"""Runs of df1688b4 resume, and weights of earlier versions load (tests/fixtures/earlier, written by earlier.py)."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from earlier import FOLDER, OF_EXAMPLES, RUNS, make_data, small_models
from mains import call, lines

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import export, features, get_model

FIRST = "df1688b4"  # whose runs resume
RESULTS = ("train_lr", "train_loss", "test_acc1", "test_loss", "test_miou", "test_pixel_acc", "chosen_blr")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    make_data(folder)
    return folder


@pytest.fixture(autouse=True)
def _small_models():
    with small_models():
        yield


@pytest.fixture(params=sorted(path.name for path in FOLDER.iterdir()))
def written(request):
    """The folder of the checkpoints of an earlier commit."""
    return FOLDER / request.param


def resume(name, which, out, data):
    script, dataset, _ = {**RUNS, **OF_EXAMPLES}[name]
    # A sharded checkpoint resumes in one process, too; there, the batch size is that of both.
    how = ["--batch_size", 4] if name == "sharded" else []
    call(importlib.import_module(script), "--resume", which, "--output_dir", out, "--data_path", data / dataset, *how)


@pytest.mark.parametrize("name", [*RUNS, *OF_EXAMPLES])
def test_a_run_resumes_in_the_middle_of_an_epoch(name, data, tmp_path):
    """Losses, rates and scores are those of the uninterrupted run of the earlier version."""
    shutil.copytree(FOLDER / FIRST / name, tmp_path / "run")
    resume(name, "auto", tmp_path / "run", data)
    expected = [json.loads(line) for line in (FOLDER / FIRST / name / "expected.txt").read_text().splitlines()]
    resumed = lines(tmp_path / "run")
    for ours, theirs in zip(resumed, expected[-len(resumed) :], strict=True):
        compared = [key for key in RESULTS if key in theirs]
        assert {key: ours[key] for key in compared} == pytest.approx({key: theirs[key] for key in compared}, rel=1e-5)


@pytest.mark.parametrize("name", OF_EXAMPLES)
def test_a_file_that_names_an_encoder_of_the_examples_is_read_and_exported(name, tmp_path):
    """The classes of examples/ are in the library now. No command names an encoder."""
    model = get_model(FOLDER / FIRST / name / "checkpoint-last.pth")
    assert bool(model.settings.get("lora")) == (name in ("continued", "lora"))
    encoder = export.encoder_of(model)
    export.export(encoder, "safetensors", tmp_path / "model.safetensors")
    merged = get_model(tmp_path / "model.safetensors")
    assert merged.settings.get("encoder") == {"lora": None, "dinov3": "dinov3"}.get(name, "dinov2")
    assert not merged.settings.get("lora")
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(merged.extract_feat(images), encoder.extract_feat(images))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("commit", sorted({path.name for path in FOLDER.iterdir()} - {FIRST}))
def test_a_run_of_a_version_before_the_first_is_refused(name, commit, data, tmp_path):
    """One line names the commit that resumes it. Nothing is written."""
    shutil.copytree(FOLDER / commit / name, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    (file,) = (tmp_path / "run").glob("checkpoint-last*")
    for which, out in (("auto", tmp_path / "run"), (file, tmp_path / "new")):
        with pytest.raises(CheckpointError, match=FIRST) as error:
            resume(name, which, out, data)
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_are_evaluated_and_start_other_runs(written, data, tmp_path):
    images = ("--data_path", data / "images", "--num_workers", 0, "--device", "cpu")
    encoder = written / "pretrain/checkpoint-last.pth"
    short = ("--finetune", encoder, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 4, "--amp", "off")
    init = ("--init_from", encoder, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 4, "--amp", "off")
    for number, (script, given) in enumerate(((main_finetune, short), (main_linprobe, short), (main_pretrain, init))):
        call(script, *images, *given, "--output_dir", tmp_path / str(number))
        assert np.isfinite(lines(tmp_path / str(number))[0]["train_loss"])
    for script, name in ((main_finetune, "finetune"), (main_segment, "segment")):
        given = ("--data_path", data / RUNS[name][1], "--num_workers", 0, "--device", "cpu")
        assert call(script, *given, "--eval", "--resume", written / name / "checkpoint-last.pth") is not None
    call(main_knn, *images, "--finetune", written / "sharded/checkpoint-last", "--k", 3)
    for file in (encoder, written / "finetune/checkpoint-last.pth", written / "sharded/checkpoint-last"):
        out = tmp_path / "rows.npz"
        call(features, data / "images", "--model", file, "--out", out, "--num_workers", 0, "--device", "cpu")
        assert np.load(out)["features"].shape == (16, 16)
        out.unlink()
