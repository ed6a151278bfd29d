"""The README's commands on the embedded images, one after the other as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from mains import lines
from test_docs import bash_blocks


def test_they_run(tmp_path):
    """In a folder with links to everything here, so that what the commands write stays there."""
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "images", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    script = [c for c in bash_blocks(ROOT / "README.md") if not c.startswith(("./run ", "source ", "torchrun "))]
    assert len(script) == 15
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "images      10,000" in done.stdout
    assert re.search(r"training    [1-9][\d,]* images/s, after a start of \d+ s\n", done.stdout)
    assert re.search(r"training    [1-9][\d,]* images/s: \d+ epochs take", done.stdout)
    assert "* 20-NN Acc@1" in done.stdout
    assert "patches masked, PSNR" in done.stdout
    assert re.search(r"[1-9][\d.]*% of the 6 nearest neighbors", done.stdout)
    written = ("predictions.png", "reconstructions.png", "features.npz", "classifier.onnx", "neighbors.png")
    for name in (*written, "runs/mine/report.html", "runs/tuned/report.html"):
        assert (tmp_path / name).stat().st_size > 5000, name
    assert len(lines(tmp_path / "runs/mine")) >= 7
    assert re.search(r"the check took \d:\d\d:\d\d; after the pre-training, .* add about \d:\d\d:\d\d", done.stdout)
    assert "Is it worth it?" in (tmp_path / "runs/mine/report.html").read_text()
    assert (tmp_path / "runs/mine/answer.json").exists()
    # What the page says to expect, less a margin.
    tuned, probed = (lines(tmp_path / "runs" / name)[-1]["test_acc1"] for name in ("tuned", "probe"))
    assert tuned > 80
    assert 70 < probed < tuned
