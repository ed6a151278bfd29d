"""benchmarks/speedrun.py: runs in real processes, what is refused, and the check of a claim."""

import json

import numpy as np
import pytest
from conftest import ROOT
from test_libraries import write_idx

from benchmarks import speedrun
from mae.cli import entry_point

pytestmark = pytest.mark.usefixtures("forked")

ENTRY = """
import time
import numpy as np
import torch

class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        x = self.scale * images.flatten(1)[:, ::14].float()
        return FEATURES

def train(images, seconds, seed):
    TRAINING
    return Encoder()
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Images of ten classes, each with bright stripes at another distance, and an empty page."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 300), ("t10k", 100)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = draw.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        images += (180 * (np.arange(28) % (2 + labels[:, None]) == 0)).astype(np.uint8)[:, None]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            write_idx(tmp_path / f"FashionMNIST/raw/{part}-{kind}-ubyte", array)
    page = tmp_path / "page.md"
    page.write_text("<!-- python benchmarks/speedrun.py -->\n<!-- end -->\n")
    names = {"DATA": tmp_path, "ROWS": tmp_path / "rows.jsonl", "PAGE": page, "SECONDS": 1.0}
    for name, value in {**names, "GRACE": 10.0}.items():  # runs have time, also on a busy machine
        monkeypatch.setattr(speedrun, name, value)
    return tmp_path


def run(*words):
    speedrun.main(entry_point.parse_command(speedrun.get_args_parser(), list(map(str, words)))[0])


def write_entry(path, features="x", training="pass"):
    path.write_text(ENTRY.replace("FEATURES", features).replace("TRAINING", training))
    return path


def test_a_run_has_a_row_above_chance(files):
    run(ROOT / "benchmarks/speedruns/baseline.py", "--seeds", 3)
    (row,) = speedrun.read()
    assert row["seed"] == 3
    assert row["score"] > 30  # chance is 10
    assert 1 <= row["seconds"] < 1 + speedrun.GRACE
    assert f"| {row['score']:.2f} |" in speedrun.PAGE.read_text()


def test_images_are_moved_and_keep_their_content():
    """Each has its own motion, the same in each run; what stays inside is not changed."""
    images = np.zeros((200, 28, 28), dtype=np.uint8)
    images[:, 9:19, 11:17] = 200  # inside after each motion
    found = speedrun.moved(images, 0)
    assert found.dtype == np.uint8 and (speedrun.moved(images, 0) == found).all()
    assert (speedrun.moved(images, 1) != found).any()
    masses = found.sum(axis=(1, 2)) / images.sum(axis=(1, 2))
    assert 0.62 < masses.min() < 0.75 and 1.25 < masses.max() < 1.46  # .8 and 1.2, squared
    rows, columns = ((found.sum(axis=axis) @ np.arange(28)) / found.sum(axis=(1, 2)) for axis in (2, 1))
    for centers in (rows, columns):
        assert 3 < np.abs(centers - 13.5).max() < 5.5 and abs(np.mean(centers) - 13.5) < 0.6
    assert len(np.unique(found, axis=0)) == 200


def test_a_rehearsal_on_held_out_images_has_no_row(files, monkeypatch, capfd):
    monkeypatch.setattr(speedrun, "HELD_OUT", 100)
    run(write_entry(files / "mine.py", training="print(len(images))"), "--seconds", 2, "--held_out", "--seeds", 0)
    assert speedrun.read() == []
    output = capfd.readouterr().out
    assert "200" in output.splitlines()  # of 300 training images
    assert "without a row" in output and '"sha256"' not in output


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"training": "time.sleep(60)"}, "has not ended"),
        ({"training": "raise KeyError"}, "failed"),
        ({"training": "open('DATA/FashionMNIST/raw/t10k-labels-idx1-ubyte')"}, "failed"),
        ({"training": "import subprocess; subprocess.run(['true'])"}, "failed"),
        ({"training": "import socket; socket.socket()"}, "failed"),
        ({"training": f"'{'x' * 20_000}'"}, "bytes"),
        ({"features": "x[1:]"}, "shape"),
        ({"features": "x.repeat(1, 3)"}, "shape"),
        ({"features": "x / 0"}, "finite"),
        ({"features": "0 * x"}, "same features"),
        ({"features": "x - x.mean(dim=0)"}, "images beside it"),
        ({"features": "torch.cat([x, 1e-6 * (x - x.mean(dim=0))], dim=1)"}, "images beside it"),
        ({"features": "x + 20 * torch.rand(x.shape)"}, "chance"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value.values())[:40],
)  # fmt: skip
def test_a_run_that_breaks_a_rule_is_refused(parts, reason, files, monkeypatch):
    if reason == "has not ended":
        monkeypatch.setattr(speedrun, "GRACE", 1.0)
    entry = write_entry(files / "mine.py", **{part: text.replace("DATA", str(files)) for part, text in parts.items()})
    with pytest.raises(ValueError, match=f"mine.py: refused, no row: .*{reason}"):
        run(entry, "--seeds", 0)
    assert speedrun.read() == []


@pytest.fixture
def entries(files, monkeypatch):
    """A record and a better entry, which has been claimed; `scores` are those of runs, by entry."""
    scores = {"record": 80.0, "mine": 84.0}
    monkeypatch.setattr(speedrun, "ENTRIES", files)
    monkeypatch.setattr(speedrun, "RECORDS", files / "records.txt")
    speedrun.RECORDS.write_text("record\n")
    for name in scores:
        write_entry(files / f"{name}.py", training=f"'{name}'")

    def measured(file, seed, *_):
        found = {"score": scores[file.stem] + 0.1 * seed, "error": 0.4}
        return {"entry": file.stem, "sha256": speedrun.digest(file), "seed": seed, **found}

    monkeypatch.setattr(speedrun, "run_entry", measured)
    run(files / "mine.py", files / "record.py", "--seeds", 0, 1, 2)
    return scores


def test_a_claim_is_tested_in_turns(entries, files, capsys):
    assert [(row["entry"], row["seed"]) for row in speedrun.read()] == [
        (entry, seed) for seed in range(3) for entry in ("mine", "record")
    ]
    run("--check", speedrun.read()[0]["sha256"][:8])
    output = capsys.readouterr().out
    assert "mine - record: +4.00" in output and ": better" in output
    assert "agrees: +0.00" in output
    assert [row["entry"] for row in speedrun.read()[6:]] == ["mine", "record"] * 3
    claim = speedrun.table().splitlines()[-1]
    assert "no record" in claim and "| +4.00 (" in claim
    speedrun.RECORDS.write_text("record\nmine\n")
    record = speedrun.table().splitlines()[-1]
    assert "no record" not in record and "| +4.00 (" in record


def test_a_claim_that_does_not_repeat_disagrees(entries, files):
    digest = speedrun.read()[0]["sha256"]
    entries["mine"] = 83.0
    with pytest.raises(ValueError, match=r"DISAGREES: -1\.00"):
        run("--check", digest[:8])


def test_a_claim_whose_file_or_evaluation_changed_is_not_checked(entries, files):
    row = speedrun.read()[0]
    speedrun.ROWS.write_text("".join(json.dumps({**row, "harness": "before"}) + "\n" for _ in range(3)))
    with pytest.raises(ValueError, match="another evaluation"):
        run("--check", row["sha256"])
    speedrun.ROWS.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    (files / "mine.py").write_text("changed = True\n")
    with pytest.raises(ValueError, match="SHA-256"):
        run("--check", row["sha256"])
    with pytest.raises(ValueError, match="0 rows"):
        run("--check", "0" * 64)
