"""What the documents show, works: code is run, commands are parsed; demo_readme.py runs those on embedded data."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_robustness
import models_mae
from benchmarks import targets
from inference import export, features, get_model, predict, reconstruct
from util import datasets
from util.cli import entry_point
from util.evaluation import robustness

DOCUMENTS = sorted(ROOT.glob("*.md"))
SCRIPTS = sorted(ROOT.glob("main_*.py"))
PARSERS = {
    "main_pretrain.py": main_pretrain.get_args_parser,
    "main_finetune.py": main_finetune.get_args_parser,
    "main_linprobe.py": main_linprobe.get_args_parser,
    "main_knn.py": main_knn.get_args_parser,
    "main_robustness.py": main_robustness.get_args_parser,
    "util.datasets": datasets.get_args_parser,
    **{f"inference.{part.__name__[10:]}": part.get_args_parser for part in (export, features, predict, reconstruct)},
}


def commands(text: str) -> list[str]:
    """The command lines of a text's bash blocks (or of all of it), continued lines joined."""
    return [line for line in re.sub(r"\\+\n\s*", "", text).splitlines() if line.strip()]


def bash_blocks(path: Path) -> list[str]:
    return [c for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.DOTALL) for c in commands(block)]


def main_commands() -> list[tuple[str, list[str]]]:
    """Every command of a main in documents, docstrings and recipe headers: (main, flags)."""
    found = [command for path in DOCUMENTS for command in bash_blocks(path)]
    for path in SCRIPTS + sorted(ROOT.glob("inference/*.py")) + sorted(ROOT.glob("recipes/*.yaml")):
        found += commands(path.read_text().replace("\n#", "\n"))
    module = r"(main_\w+\.py|inference\.\w+|util\.datasets)"
    calls = [re.search(rf"(?:python|torchrun)\s.*?{module} ([\w-].*)", command) for command in found]
    return [(call[1], shlex.split(call[2])) for call in calls if call]


@pytest.mark.parametrize(("main", "flags"), main_commands(), ids=lambda part: part if isinstance(part, str) else "")
def test_every_shown_command_parses(main, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert entry_point.parse(PARSERS[main](), flags)


def test_the_commands_were_found():
    assert len(main_commands()) >= 65


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Files of the published shapes, where torch.hub keeps them."""
    home = tmp_path_factory.mktemp("home")
    downloads = home / "hub" / "checkpoints"
    downloads.mkdir(parents=True)
    weights = {"model": get_model("vit_base_patch16").state_dict()}
    for file in ("vit-base-p16_ft-8xb128-coslr-100e_in1k_20220825-cf70aa21.pth", "mae_finetuned_vit_base.pth",
                 "mae_pretrain_vit_base.pth"):  # fmt: skip
        torch.save(weights, downloads / file)
    return home


@pytest.fixture
def run_python(downloads, tmp_path, monkeypatch):
    """Runs a document's code, beside photographs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(downloads))
    monkeypatch.setattr("util.weights.model_zoo._check", lambda path, digest: None)
    for photo in ("photo.jpg", "street.jpg", "field.jpg"):
        (tmp_path / photo).write_bytes((ROOT / "demo/photos/coffee.jpg").read_bytes())

    def run(document: str) -> dict:
        names: dict = {}
        for code in re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL):
            exec(code, names)
        return names

    return run


def test_the_readmes_python_runs(run_python):
    names = run_python("README.md")
    assert names["features"].shape == (2, 768)
    assert [a.shape for a in names["attention"]] == [(1, 12, 197, 197)] * 4
    assert names["mask"].shape == (2, 196)
    assert names["tokens"].shape == (2, 197, 768)
    assert names["painted"].pasted.shape == names["images"].shape


def test_the_results_python_runs(run_python):
    assert run_python("RESULTS.md")["features"].shape == (2, 4 * 768, 32, 32)


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_models_in_the_readme_are_all_there_are():
    text = (ROOT / "README.md").read_text()
    assert [name for name in models_mae.MODELS if name not in text and not name.endswith("dec512d8b")] == []


def test_citation_is_valid_yaml():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"


def test_the_table_of_speed_is_what_was_measured():
    assert targets.table(ROOT / "benchmarks/results") in (ROOT / "PRETRAIN.md").read_text(encoding="utf-8")


def results_row(name: str) -> list[str]:
    """The numbers of a row of RESULTS.md."""
    row = re.search(rf"^\| {re.escape(name)} \|(.*)$", (ROOT / "RESULTS.md").read_text(), flags=re.MULTILINE)
    return [cell.strip() for cell in row[1].split("|")[:4]]


def test_published_robustness_is_told_alike():
    titles = {"imagenet-c": "ImageNet-C, mCE", "imagenet-a": "ImageNet-A", "imagenet-r": "ImageNet-R",
              "imagenet-sketch": "ImageNet-Sketch"}  # fmt: skip
    for suite, published in robustness.PUBLISHED.items():
        assert results_row(titles[suite]) == [str(number) for number in published.values()]
    text = (ROOT / "RESULTS.md").read_text()
    assert [suite for suite in robustness.SUITES if f"| `{suite}` |" not in text] == []


@pytest.mark.parametrize("name", ["inat2017", "inat2018", "inat2019", "places205", "places365"])
def test_recipes_of_transfer_tell_the_published_accuracy(name):
    head = (ROOT / "recipes" / f"finetune_{name}.yaml").read_text().partition("model:")[0].replace("\n#", "")
    title = name.capitalize().replace("Inat", "iNaturalist ")
    sizes = ("ViT-B", "ViT-L", "ViT-H", "ViT-H at 448 pixels")
    assert ", ".join(f"{size} {number}" for size, number in zip(sizes, results_row(title), strict=True)) in head
    assert "settings ours, unpublished" in head


@pytest.mark.parametrize("study", ["photographs/table", "fashion_mnist/table", "fashion_mnist/corruptions"])
def test_tables_of_the_studies_are_those_that_they_wrote(study):
    told = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    for table in (ROOT / "benchmarks" / f"{study}.md").read_text(encoding="utf-8").strip().split("\n\n"):
        assert table in told
