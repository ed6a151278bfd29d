"""The order of the packages, which CONTRIBUTING.md describes, and other rules for modules."""

import ast
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import size
from size import ROOT

# From the top: a package may import those below it. `scripts` are the scripts, all modules with a command, and
# mae.session (`size.package_of`).
PACKAGES = (
    "examples",
    "benchmarks",
    "demo",
    "util",  # the names of the paper's code
    "scripts",
    "mae.cli",
    "mae.jobs",
    "mae.compare",
    "mae.recommend",
    "mae.inference",
    "engine",
    "mae.training",
    "mae.evaluate",
    "mae.build",
    "mae.weights",
    "mae.checkpoints",
    "mae.data",
    "mae.encoders",
    "mae.user_code",
    "mae.pooling",
    "mae.probes",
    "mae.settings",
    "models",
    "mae.files",
    "mae.errors",
    "mae.parallel",
    "mae.interrupts",
    "mae.reconstruction",
    "mae.valid_pixels",
    "mae.preservation",
    "mae.masking",
    "mae.uniformity",
    "mae.lora",
    "mae.context",
    "mae.fp32",
    "mae.position_tables",
    "mae.sizes",
    "mae.registry",
    "mae.plurals",
    "mae.suggestions",
)
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
    assert size.arrows_up(size.sources(), PACKAGES) == []


def test_modules_are_in_no_circle():
    known = modules()
    graph = {name: imports(file) & known.keys() for name, file in known.items()}
    list(TopologicalSorter(graph).static_order())  # raises on a circle


def test_everything_but_util_is_installed():
    """The lists of pyproject.toml are complete; PACKAGES let nothing that is installed import `util`."""
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
