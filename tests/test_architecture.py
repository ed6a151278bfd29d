"""The arrows of CONTRIBUTING.md: who may import whom. Walks the syntax trees, runs nothing."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

# A module, or a pattern of them -> what of this project it may import.
ARROWS = {
    r"submitit_\w+": r"main_\w+|util\.submit",
    r"main_robustness": r"engine_finetune|inference\.imagenet|util\.\w+",
    r"main_\w+": r"engine_\w+|models_\w+|util\.\w+",
    r"engine_\w+": r"util\.\w+",
    r"models_build": r"models_(mae|vit)",
    r"models_mae": r"models_vit|util\.pos_embed|util\.masking",
    r"models_vit": r"util\.pos_embed",
    r"hubconf": r"inference\.\w+",
    r"demo\.\w+": r"demo\.unpack_data|inference\.\w+|models_\w+|util\.\w+",
    r"benchmarks\.\w+": r"benchmarks\.\w+|inference\.\w+|models_\w+|util\.\w+",
    r"inference\.\w+": r"inference\.\w+|models_\w+|util\.\w+",
    r"util\.loop": r"util\.(precision|runlog|lr_sched|dist|interrupts)",
    r"util\.cli": r"util\.(advice|dist|interrupts|untrusted)",
    r"util\.submit": r"util\.(cli|code_copy|dist|flags|interrupts|job_wait|slurm_settings)",
    r"util\.options": r"util\.(dist|flags|loader|masking|precision|weights)",
    r"util\.epochs": r"util\.(compiling|dist|interrupts|loop|lr_sched|precision|runfolder|runlog|runstate|saver)",
    r"util\.runstate": r"util\.(advice|checkpoint|dist|runfolder|sharded)",
    r"util\.saver": r"util\.(checkpoint|dist|interrupts|loop|runstate|sharded)",
    r"util\.(checkpoint|report)": r"util\.(atomic|untrusted)",
    r"util\.sharded": r"util\.(checkpoint|cli|dist|flags|untrusted)",
    r"util\.runfolder": r"util\.(atomic|checkpoint|dist)",
    r"util\.runlog": r"util\.(atomic|dist|logfiles|untrusted)",
    r"util\.logfiles": r"util\.atomic",
    r"util\.knn": r"util\.dist",
    r"util\.published": r"util\.(atomic|dist)",
    r"util\.fsdp": r"util\.dist",
    r"util\.weights": r"util\.(advice|dist|pos_embed|checkpoint|foreign|published|sharded|transforms|untrusted)",
    r"util\.datasets": r"util\.(advice|cli|dist|flags|options|archives|decode|library_sets|loader|sources|transforms"
    r"|untrusted)",
    r"util\.resize": r"util\.(atomic|cli|flags|decode|loader|sources|untrusted)",
    r"util\.labels": r"util\.(decode|library_sets|sources)",
    r"util\.suites": r"util\.(archives|labels|sources)",
    r"util\.suite_report": r"util\.(atomic|suites)",
    r"util\.loader": r"util\.(dist|interrupts|decode|library_sets|samples|transforms)",
    r"util\.samples": r"util\.(dist|decode|jpeg|library_sets|sources|transforms)",
    r"util\.library_sets": r"util\.(advice|dist|archives|decode|sources|untrusted)",
    r"util\.archives": r"util\.(advice|decode|sources|untrusted)",
    r"util\.sources": r"util\.(advice|decode|untrusted)",
    r"util\.pictures": r"util\.transforms",
    r"util\.transforms": r"util\.(bicubic|pos_embed|decode)",
    r"util\.decode": r"util\.(jpeg|tiff_bounds|untrusted)",
    r"util\.jpeg": r"util\.bicubic",
    r"util\.\w+": r"",  # the rest are leaves
}
# Optional packages, each imported in one file only.
OPTIONAL = {"gradio", "onnx", "onnxruntime", "onnxscript", "transformers", "torchcodec", "numba", "datasets",
            "submitit", "webdataset"}  # fmt: skip


def modules() -> dict[str, Path]:
    folders = ("util", "inference", "demo", "benchmarks")
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).glob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files if f.name != "__init__.py"}


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            assert not isinstance(node, ast.ImportFrom), f"{file}: a relative import"
    return names


def test_imports_point_down_only():
    known = modules()
    graph = {name: imports(file) & known.keys() for name, file in known.items()}
    wrong = []
    for name, targets in graph.items():
        allowed = next((may for who, may in ARROWS.items() if re.fullmatch(who, name)), None)
        assert allowed is not None, f"{name} has no place in ARROWS"
        wrong += [f"{name} -> {target}" for target in sorted(targets) if not re.fullmatch(allowed, target)]
    assert wrong == []
    list(TopologicalSorter(graph).static_order())  # raises on a cycle


def test_optional_packages_have_one_home():
    homes: dict[str, list[str]] = {}
    for name, file in modules().items():
        if name.startswith("benchmarks."):  # they time other libraries
            continue
        for package in {target.split(".")[0] for target in imports(file)} & OPTIONAL:
            homes.setdefault(package, []).append(name)
    assert {package: where for package, where in homes.items() if len(where) > 1} == {}


def test_only_dist_reads_the_launchers_environment():
    for name, file in modules().items():
        if name != "util.dist":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"""["'](RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|SLURM_(?!CONF)\w+)["']""", text), name


def test_layout_in_contributing_is_true():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    layout = text.split("```")[1]
    for name in modules():
        assert Path(name.replace(".", "/")).name + ".py" in layout, f"CONTRIBUTING.md does not mention {name}"
    for mentioned in re.findall(r"^ *(\w+\.py)", layout, flags=re.MULTILINE):
        assert any(f"{name}.py".endswith(mentioned) for name in modules()), (
            f"CONTRIBUTING.md mentions {mentioned}, which is not there"
        )


def test_house_sizes():
    for name, file in modules().items():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 360, f"{name}: more than one subject?"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 85, f"{name}.{node.name}"
