"""The comparison of linear and attentive probes on the embedded images, with one epoch on few images."""

import numpy as np
import torch
from mains import call

import mae.build
import main_linprobe
from benchmarks.fashion_mnist import probes
from mae.settings import specs

MINI = {"model": "mae_vit_mini_patch4", "input_size": 28, "patch_size": 7, "in_chans": 1, "norm_pix_loss": False}


def test_the_table_has_the_accuracies_of_all_runs(labelled, tmp_path, monkeypatch, capsys):
    calls = []

    def run(script, *words):
        assert script == "main_linprobe.py"
        arguments = list(map(str, words))
        calls.append(arguments)
        call(main_linprobe, *arguments)

    monkeypatch.setattr(probes.scripts, "run", run)
    monkeypatch.setattr(probes, "SEEDS", range(2))
    torch.save({"model": mae.build.autoencoder(*specs(MINI)).state_dict()}, tmp_path / "encoder.pth")
    flags = ["--data_path", labelled, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 8, "--device", "cpu",
             "--num_workers", 0]  # fmt: skip
    probes.main(list(map(str, ["--encoder", tmp_path / "encoder.pth", "--work", tmp_path, *flags])))
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {cells[0]: cells[1:] for cells in lines[-3:]}
    assert list(rows) == list(probes.PROBES)
    assert [arguments[arguments.index("--seed") + 1] for arguments in calls] == ["0", "1"] * 3
    folders = ("linear-class_token", "linear-mean_of_patches", "attentive")
    for (first, second, summary), out in zip(rows.values(), folders, strict=True):
        assert (tmp_path / out / "1" / "probe.pth").exists()
        mean, deviation = np.mean([float(first), float(second)]), np.std([float(first), float(second)], ddof=1)
        found = list(map(float, summary.split(" ± ")))
        np.testing.assert_allclose(found, [mean, deviation], atol=0.11)
    assert (tmp_path / "attentive/0/tokens").exists()
    assert not (tmp_path / "linear-class_token/0/tokens").exists()
