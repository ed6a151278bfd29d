"""What the documents show, works: commands on embedded data are run, all others are parsed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
from util import cli

DOCUMENTS = sorted(ROOT.glob("*.md"))
SCRIPTS = sorted(ROOT.glob("main_*.py"))
PARSERS = {
    "main_pretrain.py": main_pretrain.get_args_parser,
    "main_finetune.py": main_finetune.get_args_parser,
    "main_linprobe.py": main_linprobe.get_args_parser,
    "main_knn.py": main_knn.get_args_parser,
}


def commands(text: str) -> list[str]:
    """The command lines of a text's bash blocks (or of all of it), continued lines joined."""
    return [line for line in re.sub(r"\\+\n\s*", "", text).splitlines() if line.strip()]


def bash_blocks(path: Path) -> list[str]:
    return [c for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.DOTALL) for c in commands(block)]


def main_commands() -> list[tuple[str, list[str]]]:
    """Every command of a main in documents, docstrings and recipe headers: (main, flags)."""
    found = [command for path in DOCUMENTS for command in bash_blocks(path)]
    for path in SCRIPTS + sorted(ROOT.glob("recipes/*.yaml")):
        found += commands(path.read_text().replace("\n#", "\n"))
    calls = [re.search(r"(?:python|torchrun)\s.*?(main_\w+\.py) (--.*)", command) for command in found]
    return [(call[1], shlex.split(call[2])) for call in calls if call]


@pytest.mark.parametrize(("main", "flags"), main_commands(), ids=lambda part: part if isinstance(part, str) else "")
def test_every_shown_command_parses(main, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.parse(PARSERS[main](), flags)


def test_the_commands_were_found():
    assert len(main_commands()) >= 9


def test_the_readmes_commands_run(tmp_path):
    """In a folder with links to everything here, so that what the commands write stays there."""
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "images", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    script = [c for c in bash_blocks(ROOT / "README.md") if not c.startswith(("./run ", "source ", "torchrun "))]
    assert len(script) == 8
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "images      10,000" in done.stdout
    assert "resuming from" in done.stdout
    assert done.stdout.count("* Acc@1") == 5 + 1 + 10
    assert "* 20-NN Acc@1" in done.stdout
    assert len((tmp_path / "runs/mine/log.txt").read_text().splitlines()) == 3


def test_the_readmes_python_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["mask"].shape == (2, 196)
    assert names["tokens"].shape == (2, 197, 768)
    assert names["painted"].pasted.shape == names["images"].shape


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_models_in_the_readme_are_all_there_are():
    text = (ROOT / "README.md").read_text()
    assert [name for name in main_pretrain.MODELS if name not in text and not name.endswith("dec512d8b")] == []


def test_citation_is_valid_yaml():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
