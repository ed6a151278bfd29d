"""The commands of DATA.md for sounds: pre-training is better than random weights by the margin of the page."""

import re

from mains import run_section


def test_pretraining_helps(tmp_path):
    output = run_section("DATA.md", "## Sounds", tmp_path)
    trained, random = (float(score) for score in re.findall(r"\* 10-NN Acc@1 ([\d.]+)", output))
    assert trained > random + 15
