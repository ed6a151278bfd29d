"""The documents are correct: code is run and commands are parsed. demo_readme.py runs the README's commands."""

import ast
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest
import tables
import torch
import yaml
from conftest import ROOT
from golden_settings import SCRIPTS, parser_of

import hubconf
import models_mae
import models_vit
from mae.cli import entry_point
from mae.evaluate import suites
from mae.inference import export, get_model
from mae.weights import model_zoo

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "demo/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "table.md" and "output" not in path.parts  # tables are written by the studies
)
NOTEBOOK = ROOT / "demo/mae_visualize.ipynb"
RUN = (ROOT / "run").read_text()
OTHER_FLAGS = {  # of torchrun, tensorboard, pip, uvx, Docker, Slurm, hf, Chromium and tests/golden_settings.py
    "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max-restarts", "--logdir", "--gpu-bind",
    "--from", "--gpus-per-node", "--index-url", "--shm-size", "--signal", "--standalone", "--write", "--local-dir",
    "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size", "--screenshot",
    "--no_NAME",  # of any flag
}  # fmt: skip


def commands(text: str) -> list[str]:
    """The command lines of a text's bash blocks (or of all of it), continued lines joined."""
    return [line for line in re.sub(r"\\+\n\s*", "", text).splitlines() if line.strip()]


def bash_blocks(path: Path) -> list[str]:
    return [c for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.DOTALL) for c in commands(block)]


def test_the_extras_of_the_readme_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = (ROOT / "README.md").read_text().partition("| extra | adds |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(project["optional-dependencies"])


def parse(script: str, flags: list[str]) -> Namespace:
    parser = parser_of(script.removesuffix(".py").replace("/", "."))
    if isinstance(parser, type(entry_point.parser(""))):
        return entry_point.parse_command(parser, flags)[0]
    return parser.parse_args(flags)


def script_commands() -> list[tuple[str, list[str]]]:
    """Every command of a script in documents, docstrings, recipe headers and `run`: (script, flags)."""
    lines = []
    for path in (*ROOT.glob("main_*.py"), *ROOT.glob("mae/inference/*.py"), *ROOT.glob("recipes/*.yaml")):
        lines += commands(path.read_text().replace("\n#", "\n"))
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        lines += bash_blocks(path) + commands("\n".join(re.findall(r"^    (.*)$", text, re.MULTILINE)))
        inline = re.findall(r"`(python (?:demo|benchmarks)/[^`]*)`", text)
        lines += [" ".join(command.split()) for command in inline]  # in the text, where they may wrap
    for path in (*ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("examples/*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        complete = [line for line in commands(docstring) if not line.endswith("...")]
        lines += [line for line in complete if line.strip().startswith("python ")]
    lines += [line for line in commands(RUN) if "show python" in line and "$@" not in line]
    lines = [
        re.sub(r"--config (mine|microscope|photographs)\.yaml", "--config pretrain_vit_base", line) for line in lines
    ]
    lines = [line.replace("--config tuned.yaml", "--config finetune_vit_base") for line in lines]
    scripts = r"(?:main|submitit)_\w+\.py|(?<=-m )main_\w+|(?:demo|benchmarks)/[\w/]+\.py"
    modules = r"mae\.inference\.\w+|mae\.data(?:\.resize)?|mae\.checkpoints\.sharded"
    calls = [re.search(rf"(?:python|torchrun)\s.*?({scripts}|{modules})(?: (\S.*))?", line) for line in lines]
    commands_of = {"mae.data": "mae.recommend.check"}  # packages
    found = [(commands_of.get(call[1], call[1]), shlex.split(call[2] or "", comments=True)) for call in calls if call]
    assert len(found) >= 150
    return found


@pytest.mark.parametrize(("script", "flags"), script_commands(), ids=lambda part: part if isinstance(part, str) else "")
def test_every_command_parses(script, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if flags or hasattr(module, "get_args_parser"):  # some scripts take no arguments
        assert parse(script, flags)


@pytest.fixture(scope="module")
def known_flags():
    parsers = [*map(parser_of, SCRIPTS)]
    for file in (*ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/**/*.py")):
        module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        parsers += [module.get_args_parser()] if hasattr(module, "get_args_parser") else []
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_and_flags_of_a_document_exist(path, known_flags):
    """Every file that a command runs, every file and directory of this repository and every flag that a page names."""
    text = path.read_text(encoding="utf-8")
    ours = text.partition("## mmpretrain")[0]  # the rest of docs/migrating.md quotes other libraries
    folders = r"(?:recipes|benchmarks|docs|util|mae|demo/(?!output)|tests)"
    files = re.findall(r"python ([\w/]+\.py)", ours) + re.findall(rf"(?<![\w/.-])({folders}/?\w[\w/]*\.\w+)", text)
    assert [file for file in files if "/" in file and not (ROOT / file).exists()] == []
    tasks = set(re.findall(r"^([a-z-]+)\(\) \{", RUN, re.MULTILINE))
    assert set(re.findall(r"(?:`|^ *)\./run ([a-z][a-z-]*)", text, re.MULTILINE)) <= tasks
    if path.name != "migrating.md":
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        of_tasks = set(re.findall(r"^ +(--[a-z-]+)\)", RUN, re.MULTILINE))
        assert named - known_flags - OTHER_FLAGS - of_tasks == set()


@pytest.fixture
def run_python(tmp_path, monkeypatch):
    """Runs a document's code beside photographs; the cache of torch.hub has files with the names of published ones.

    ViT-B has a third of its blocks.
    """
    monkeypatch.setitem(models_vit.SIZES, "base_patch16", models_vit.SIZES["base_patch16"] | {"depth": 4})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    downloads = tmp_path / "hub" / "checkpoints"
    downloads.mkdir(parents=True)
    torch.save({"model": get_model("vit_base_patch16").state_dict()}, downloads / "mae_pretrain_vit_base.pth")
    for file in ("vit-base-p16_ft-8xb128-coslr-100e_in1k_20220825-cf70aa21.pth", "mae_finetuned_vit_base.pth"):
        (downloads / file).symlink_to(downloads / "mae_pretrain_vit_base.pth")
    without_digests = {name: row._replace(digest=None) for name, row in model_zoo.TABLE.items()}
    monkeypatch.setattr(model_zoo, "TABLE", without_digests)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    for photo in ("street.jpg", "field.jpg"):
        (tmp_path / photo).write_bytes((ROOT / "demo/photos/coffee.jpg").read_bytes())

    def run(document: str, part: str = "") -> dict:
        """Runs the blocks that contain `part`."""
        names: dict = {}
        for code in re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL):
            if part in code:
                exec(code, names)
        return names

    return run


@pytest.mark.slow
def test_the_python_of_documents_runs(run_python):
    assert run_python("README.md")["features"].shape == (2, 768)
    classifier = get_model("vit_mini_patch4", nb_classes=3, crop_pct=0.875)
    export.export(classifier, "onnx", Path("classifier.onnx"))
    names = run_python("docs/zoo.md")
    scores = torch.from_numpy(names["logits"]).softmax(1)[0].numpy()
    assert scores == pytest.approx(classifier.predict("demo/photos/coffee.jpg")["pred_scores"], abs=1e-5)
    assert names["features"].shape == (2, 768)
    assert [a.shape for a in names["attention"]] == [(1, 12, 197, 197)] * 4
    assert names["mask"].shape == (2, 196)
    assert names["tokens"].shape == (2, 197, 768)
    assert names["reconstruction"].pasted.shape == names["images"].shape
    assert names["heat_maps"].shape == (2, 224, 224)
    names = run_python("docs/segmentation.md", "mae.inference.maps import dense")
    assert names["features"].shape == (2, 4 * 768, 32, 32)
    assert names["complete"].shape == (1, 4 * 768, 25, 38)  # of 400 x 600 pixels


def anchors(path: Path, level: str = "#+") -> set[str]:
    """The headings of a page as anchors of links."""
    headings = re.findall(rf"^{level} (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, path: Path) -> list[str]:
    """The relative links and pictures of a page whose file or heading does not exist."""
    broken = []
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        page = path.parent / target if target else path
        if not page.exists() or (anchor and anchor not in anchors(page)):
            broken.append(f"{target}#{anchor}")
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    """A long page begins with a link to every section."""
    text = path.read_text(encoding="utf-8")
    assert broken_links(text, path) == []
    if text.count("\n") > 100 and path.name not in ("CHANGELOG.md", "CONTRIBUTING.md", "SCALING.md"):
        assert set(re.findall(r"\(#([^)]*)\)", text[: text.index("\n## ")])) == anchors(path, "##")


def test_links_and_imports_of_the_notebook_resolve():
    texts = {"markdown": "", "code": ""}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        texts[cell["cell_type"]] += "".join(cell["source"]) + "\n"
    assert broken_links(texts["markdown"], NOTEBOOK) == []
    modules = [node.module for node in ast.walk(ast.parse(texts["code"])) if isinstance(node, ast.ImportFrom)]
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_pages_that_the_code_names_exist():
    """In help texts, error messages, comments and recipes."""
    command = ["git", "ls-files", "*.py", "*.yaml", "*.toml", "run"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    text = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    named = set(re.findall(r"(?<![\w/])(?:docs|demo|benchmarks)/[\w/]+\.md", text))
    assert [page for page in sorted(named) if not (ROOT / page).exists()] == []


def test_functions_and_classes_that_contributing_names_exist():
    """`NAME`, `NAME` in `FILE.py`"""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.findall(r"((?:`\w+`(?:, | and )?)+) in\s+`([\w/]+\.py)`", text)
    assert len(found) > 15
    for names, file in found:
        nodes = [*ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))]
        known = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        known |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assert set(re.findall(r"`(\w+)`", names)) - known == set(), file


def test_the_model_zoo_names_every_model():
    text = (ROOT / "docs/zoo.md").read_text()
    assert [name for name in models_mae.MODELS if name not in text and not name.endswith("dec512d8b")] == []


def test_the_requirements_of_a_space_are_those_of_the_code():
    command = re.search(r"^(python -c .*) > requirements.txt$", (ROOT / "demo/SPACE.md").read_text(), re.MULTILINE)[1]
    written = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    requirements, names = re.findall(r"^[\w-]+", written, re.MULTILINE), {"PIL": "pillow", "yaml": "pyyaml"}
    assert {names.get(name, name) for name in hubconf.dependencies} <= set(requirements)


def test_citation_is_valid_yaml():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"


@pytest.mark.slow
def test_tables_are_those_of_their_sources():
    """python tests/tables.py rewrites them."""
    pages = dict(tables.pages())
    assert len(pages) == 12
    for path, text in pages.items():
        assert tables.rewritten(text) == text, path


def test_results_md_has_the_published_robustness():
    text = (ROOT / "docs/results.md").read_text()
    titles = {"imagenet-c": "ImageNet-C, mCE", "imagenet-a": "ImageNet-A", "imagenet-r": "ImageNet-R",
              "imagenet-sketch": "ImageNet-Sketch"}  # fmt: skip
    for suite, published in suites.PUBLISHED.items():
        row = re.search(rf"^\| {titles[suite]} \|(.*)$", text, flags=re.MULTILINE)[1]
        assert [cell.strip() for cell in row.split("|")[:4]] == [str(number) for number in published]
    assert [suite for suite in suites.SUITES if f"| `{suite}` |" not in text] == []


@pytest.mark.parametrize(
    ("page", "section", "study"),
    [("docs/small_data", "## Settings", "small_data/table"), ("docs/small_data", "## Digits", "small_data/digits"),
     ("benchmarks/fashion_mnist/README", "## Accuracy", "fashion_mnist/table"),
     ("README", "## Is it worth it?", "fashion_mnist/table")],
)  # fmt: skip
def test_the_accuracies_quoted_from_a_study_are_in_its_table(page, section, study):
    """Numbers with a decimal and a percent sign, also with a standard deviation."""
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8").partition(section)[2].partition("\n## ")[0]
    table = (ROOT / f"benchmarks/{study}.md").read_text(encoding="utf-8")
    quoted = re.findall(r"(\d+\.\d(?: ± \d+\.\d)?) %", " ".join(text.split()))
    assert quoted
    assert [number for number in quoted if not re.search(rf"[ *]{re.escape(number)}[ *]", table)] == []


def test_the_signatures_of_the_steps_are_those_of_the_model():
    page = (ROOT / "docs/method.md").read_text()
    (shown,) = ast.parse(page.split("```python\n")[1].partition("```")[0]).body
    for step in shown.body:
        method = inspect.signature(getattr(models_mae.MaskedAutoencoderViT, step.name))
        exec(ast.unparse(step), names := {})
        named = [(p.name, p.kind, p.default) for p in inspect.signature(names[step.name]).parameters.values()]
        assert named == [(p.name, p.kind, p.default) for p in method.parameters.values()], step.name
    exec(f"def {re.search(r'`(block_inputs.*?)`', page)[1]}: ...", names)
    block_inputs = inspect.signature(models_mae.MaskedAutoencoderViT.block_inputs).parameters
    shown = inspect.signature(names["block_inputs"]).parameters
    assert [(p.name, p.default) for p in shown.values()] == [(p.name, p.default) for p in block_inputs.values()][1:]
