"""The allowed imports of CONTRIBUTING.md, checked on the syntax trees."""

import ast
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

# A package of mae -> the packages that it may import. Every package may import itself and SHARED.
PACKAGES = {
    "files": "files", "data": "files", "evaluate": "data|files", "checkpoints": "files",
    "weights": "checkpoints|data|files", "training": "evaluate|data|weights|checkpoints|files", "jobs": "cli|files",
    "cli": "files", "compare": "data|evaluate|training|weights|files",
}  # fmt: skip
SHARED = (
    r"mae\.(context|errors|fp32|interrupts|masking|parallel|pooling|position_tables|settings(\.\w+)?|suggestions|"
    r"uniformity|user_code)"
)
# A module, or a pattern of modules -> the modules of this project that it may import.
ARROWS = {
    r"submitit_\w+": r"main_\w+|mae\.jobs\.submit",
    r"main_compare": r"main_(knn|linprobe|finetune)|models_\w+|mae\..+",
    r"main_\w+": r"engine_\w+|models_\w+|mae\..+",
    r"engine_\w+": r"models_mae|mae\..+",
    r"models_mae": r"models_vit|mae\.(context|fp32|masking|position_tables|uniformity)",
    r"models_segment": r"models_vit",
    r"models_timm": r"models_vit|mae\.(position_tables|suggestions)",
    r"models_vit": r"mae\.(context|position_tables)",
    r"pretrain_\w+": r"(main|engine|models)_\w+|mae\..+",  # scripts of your own on top of main_pretrain
    r"hubconf": r"mae\.inference\.\w+",
    r"demo\.\w+": r"demo\.(outputs|segmentation|unpack_data)|main_segment|models_\w+|mae\..+",
    # Studies:
    r"benchmarks\.\w+\.\w+": r"benchmarks(\.\w+)+|main_pretrain|demo\.unpack_data|models_\w+|mae\..+",
    r"benchmarks\.\w+": r"benchmarks(\.\w+)+|engine_\w+|main_\w+|models_\w+|mae\..+",
    r"util\.\w+": r"models_vit|mae\..+",  # the names of the paper's code
    r"mae\.probes": r"models_vit|mae\.settings(\.\w+)?",
    r"mae\.build": r"models_\w+|mae\.(masking|probes|settings(\.\w+)?|weights\.\w+|checkpoints\.checkpoint|user_code)",
    r"mae\.inference\.\w+": r"models_\w+|mae\..+",
    r"mae\.training\.lr_sched": r"mae\.settings",
    r"mae\.settings\.\w+": r"mae\.(position_tables|masking|files\.recipes|settings\.\w+)",
    # Modules with a command of their own:
    r"mae\.data\.__main__": r"mae\.(cli|recommend)\.\w+",
    r"mae\.recommend\.check": rf"mae\.(cli|data|files|recommend)\.\w+|{SHARED}",
    r"mae\.checkpoints\.sharded": rf"mae\.(cli|checkpoints|files)\.\w+|{SHARED}",
    r"mae\.training\.compiling": r"mae\.build",
    r"mae\.weights\.model_settings": rf"models_\w+|mae\.((weights|checkpoints|data)\.\w+)|{SHARED}",
    r"mae\.weights\.(dino|timm_models|loading)": rf"models_\w+|mae\.(checkpoints|weights)\.\w+|{SHARED}",
    r"mae\.training\.muon": r"mae\.parallel",
    r"mae\.training\.optimizers": rf"models_vit|mae\.training\.muon|{SHARED}",
    r"mae\.recommend\.\w+": rf"models_vit|mae\.(recommend|training|data|files)\.\w+|{SHARED}",
    r"mae\.compare\.(encoders|costs)": rf"mae\.(build|(compare|evaluate|files|training|weights)\.\w+)|{SHARED}",
    **{rf"mae\.{name}(\.\w+)+": rf"mae\.({name}|{below})(\.\w+)+|{SHARED}" for name, below in PACKAGES.items()},
    r"mae\.uniformity": r"mae\.fp32",
    r"mae\.user_code": r"mae\.(suggestions|settings(\.\w+)?)",
    r"mae\.pooling": r"mae\.settings\.choices",
    r"mae\.\w+": r"",  # the rest are leaves
}
# Optional packages, each imported in one file only.
OPTIONAL = {"gradio", "onnx", "onnxruntime", "onnxscript", "transformers", "torchcodec", "datasets",
            "submitit", "webdataset"}  # fmt: skip


def modules() -> dict[str, Path]:
    folders = ("util", "mae", "mae/*", "mae/*/*", "demo", "benchmarks", "benchmarks/*")
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in ROOT.glob(f"{folder}/*.py"))]
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
    assert wrong == [], wrong
    list(TopologicalSorter(graph).static_order())  # raises on a cycle


def test_everything_but_util_is_installed():
    """The lists of pyproject.toml are complete; ARROWS let nothing that is installed import `util`."""
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    own = {name for name in modules() if re.fullmatch(r"(engine|main|models|submitit)_\w+", name)}
    assert {*installed["py-modules"]} == own
    packages = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("mae/**/__init__.py")}
    assert {*installed["packages"]} == packages | {"mae.recipes"}


def test_optional_packages_have_one_home():
    homes: dict[str, list[str]] = {}
    for name, file in modules().items():
        if name.startswith("benchmarks."):  # they time other libraries
            continue
        for package in {target.split(".")[0] for target in imports(file)} & OPTIONAL:
            homes.setdefault(package, []).append(name)
    assert {package: where for package, where in homes.items() if len(where) > 1} == {}


def test_one_module_reads_the_launchers_environment():
    for name, file in modules().items():
        if name != "mae.parallel":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"""["'](RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|SLURM_(?!CONF)\w+)["']""", text), name


def test_functions_are_short():
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 70, f"{name}.{node.name}"


def test_tests_use_no_private_name():
    """A private function may be renamed or split freely."""
    own = {name.split(".")[0] for name in modules()}
    for file in ROOT.glob("tests/**/*.py"):
        imported, used = set(), []
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in own:
                imported |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names if alias.name.split(".")[0] in own}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used.append((node.value.id, node.attr))
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr" and len(node.args) > 1:
                used.append((ast.unparse(node.args[0]), str(getattr(node.args[1], "value", ""))))
        private = [f"{owner}.{name}" for owner, name in used if owner in imported and re.match("_[a-z]", name)]
        private += [name for name in imported if re.match("_[a-z]", name)]
        assert set(private) <= {"Reconstruction._fields"}, file
