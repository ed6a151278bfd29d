"""The size of this repository, of the files that git tracks, and what a reader follows in it: `./run size`.

tests/test_size.py holds the limits.
"""

import argparse
import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOF = (  # mae/jobs has the commands submitit_*.py
    "main_", "submitit_", "mae/session.py", "mae/cli/", "mae/settings/", "mae/jobs/", "util/", "demo/", "benchmarks/",
    "examples/", "hubconf",
)  # fmt: skip
FLAG = re.compile(r"--([a-z]\w+)")
# DESIGN, "Imports": what a reader of method and loop opens, and what left these files.
METHOD_AND_LOOP = (
    "main_pretrain.py", "models_mae.py", "models_vit.py", "engine_pretrain.py", "mae/training/loop.py",
    "mae/training/trainer.py", "mae/training/precision.py", "mae/training/lr_sched.py", "mae/training/optimizers.py",
)  # fmt: skip
VAGUE = ("own", "which", "place", "cell", "theirs", "lap", "settle", "alone", "rescue")  # say nothing of a value
BESIDE = (
    "mae/session.py", "mae/training/transaction.py", "mae/training/unlabelled.py", "mae/training/amp.py",
    "mae/valid_pixels.py", "mae/reconstruction.py",
)  # fmt: skip


def sources(root: Path = ROOT) -> dict[str, ast.Module]:
    """Returns the syntax trees of the Python files outside of tests, by path."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True).stdout
    paths = [path for path in listed.splitlines() if not path.startswith("tests/") and (root / path).is_file()]
    return {path: ast.parse((root / path).read_bytes()) for path in paths}


def is_command(tree: ast.Module) -> bool:
    """Whether a module has a command line."""
    parsers = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} & {"get_args_parser"}
    return bool(parsers) or any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def imports(tree: ast.Module) -> set[str]:
    """Returns the names of the modules that a module imports anywhere, and of what it imports from them."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "lazily":
            names.add(ast.literal_eval(node.args[0]))
    return names


def imports_of_packages(trees: dict[str, ast.Module]) -> dict[tuple[str, str], list[str]]:
    """Returns the imports between packages, `module -> module`, by both packages (`package_of`)."""
    names = {path: path.removesuffix(".py").replace("/", ".") for path in trees if not path.endswith("__init__.py")}
    package = {name: package_of(path, trees[path]) for path, name in names.items()}
    found: dict[tuple[str, str], list[str]] = {}
    for path, name in names.items():
        for target in sorted(imports(trees[path]) & package.keys()):
            if package[name] != package[target]:
                found.setdefault((package[name], package[target]), []).append(f"{name} -> {target}")
    return found


def package_of(path: str, tree: ast.Module) -> str:
    """Returns the package of a module. The scripts, modules with a command, and `mae.session` are one."""
    top, *rest = path.removesuffix(".py").split("/")
    if top.startswith(("main_", "submitit_", "hubconf")) or path == "mae/session.py":
        return "scripts"
    if top == "mae":
        return "scripts" if is_command(tree) else f"mae.{rest[0]}"
    return top.partition("_")[0]


def packages_in_circles(trees: dict[str, ast.Module]) -> list[str]:
    """Lists the packages that import themselves through others."""
    arrows = imports_of_packages(trees).keys()

    def reached(start: str) -> set[str]:
        found = set[str]()
        new = {start}
        while new:
            new = {target for package, target in arrows if package in new} - found
            found |= new
        return found

    return sorted(package for package in {package for package, _ in arrows} if package in reached(package))


def arrows_up(trees: dict[str, ast.Module], packages: Sequence[str]) -> list[str]:
    """Lists the imports that do not point to a package further down in `packages`, the order from the top."""
    level = {package: number for number, package in enumerate(packages)}
    between = imports_of_packages(trees).items()
    return [arrow for (package, target), arrows in between if level[package] >= level[target] for arrow in arrows]


def functions_with_run(trees: dict[str, ast.Module]) -> list[str]:
    """Lists the functions below the scripts that take all settings, by the annotation `run: Run`."""
    found = []
    for path, tree in trees.items():
        if path.startswith(ROOF) or is_command(tree):
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                annotations = [node.annotation for node in ast.walk(function.args) if isinstance(node, ast.arg)]
                parts = [part for note in annotations if note for part in ast.walk(note)]
                if any(isinstance(part, ast.Name) and part.id == "Run" for part in parts):
                    found.append(f"{path} {function.name}")
    return found


def changes_of_run(trees: dict[str, ast.Module]) -> list[str]:
    """Lists the calls of `Run.changed`."""
    calls = [(path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [f"{path}:{call.lineno}" for path, call in calls if getattr(call.func, "attr", "") == "changed"]


def packed_assignments(trees: dict[str, ast.Module]) -> list[str]:
    """Lists the assignments `a, b = x, y`, without those in which a value needs the old value of an earlier target."""
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                parts = [{ast.unparse(part) for part in ast.walk(value)} for value in node.value.elts]
                targets = [ast.unparse(part) for target in node.targets for part in getattr(target, "elts", ())]
                is_swap = any(target in used for number, target in enumerate(targets) for used in parts[number + 1 :])
                if targets and not is_swap:
                    found.append(f"{path}:{node.lineno}")
    return found


def products_with_booleans(trees: dict[str, ast.Module]) -> list[str]:
    """Lists the products of a text or a list and a boolean. A name is one if the module annotates or assigns it so."""
    found = []
    for path, tree in trees.items():
        names = set[str]()
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.annotation and ast.unparse(node.annotation) == "bool":
                names.add(node.arg)
            elif isinstance(node, ast.Assign) and _is_boolean(node.value):
                names.add(ast.unparse(node.targets[0]))
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                pairs = ((node.left, node.right), (node.right, node.left))
                if any(_is_sequence(a) and (_is_boolean(b) or ast.unparse(b) in names) for a, b in pairs):
                    found.append(f"{path}:{node.lineno}")
    return found


def vague_names(trees: dict[str, ast.Module]) -> list[str]:
    """Lists the variables, parameters, attributes, functions and classes with one of the names VAGUE or its plural."""
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute) and not isinstance(node.ctx, ast.Store):
                continue
            name = next((getattr(node, kind) for kind in ("id", "attr", "arg", "name") if hasattr(node, kind)), None)
            is_vague = str(name).strip("_").lower().removesuffix("s") in {word.removesuffix("s") for word in VAGUE}
            if is_vague and not isinstance(node, ast.keyword | ast.alias):
                found.append(f"{path}:{node.lineno} {name}")
    return found


def _is_sequence(node: ast.AST) -> bool:
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_text or isinstance(node, ast.JoinedStr | ast.List | ast.Tuple)


def _is_boolean(node: ast.AST) -> bool:
    """Whether a value is a boolean by its syntax."""
    is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in ("bool", "any", "all", "isinstance")
    is_negation = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return is_call or is_negation or isinstance(node, ast.Compare | ast.BoolOp)


def imports_of_the_roof(trees: dict[str, ast.Module]) -> list[str]:
    """Lists the modules below the roof that import `mae.cli` or argparse. Modules with a command may."""
    found = []
    for path, tree in trees.items():
        if path.startswith(ROOF) or is_command(tree):
            continue
        if any(name.startswith(("mae.cli", "argparse")) for name in imports(tree)):
            found.append(path)
    return found


def flags_in_strings(trees: dict[str, ast.Module]) -> Counter[str]:
    """Counts the flags of settings in strings below the roof, by file.

    Docstrings and modules with a command do not count, nor do flags of other programs, such as git.
    """
    counts: Counter[str] = Counter()
    known = definitions(trees)
    for path, tree in trees.items():
        if path.startswith(ROOF) or is_command(tree):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                      if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                counts[path] += sum(name in known for name in FLAG.findall(node.value))
    return +counts


def definitions(trees: dict[str, ast.Module]) -> Counter[str]:
    """Counts the definitions of each setting of a run: fields, and calls of `add_argument` with its name."""
    counts: Counter[str] = Counter()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            is_field = isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)
            if path.startswith("mae/settings/") and is_field and ast.unparse(node.value.func) == "setting":
                counts[ast.unparse(node.target)] += 1
    for path, tree in trees.items():
        for node in ast.walk(tree) if path.startswith(("main_", "mae/cli/")) else ():
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                flags = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                counts.update(str(flag).removeprefix("--") for flag in flags)
    return counts


def statements(nodes: Iterable[ast.AST]) -> int:
    """Returns the number of statements."""
    return sum(isinstance(node, ast.stmt) for node in nodes)


def lines_of(root: Path, paths: Iterable[str]) -> Counter[str]:
    """Returns the number of lines of the files that exist."""
    return Counter({path: len((root / path).read_bytes().splitlines()) for path in paths if (root / path).is_file()})


def report(root: Path = ROOT) -> list[str]:
    """The numbers, a line for each, without those of a run (`traces.report`)."""
    from test_architecture import PACKAGES

    trees = sources(root)
    read = lines_of(root, METHOD_AND_LOOP)
    beside = lines_of(root, BESIDE)
    sizes = {path: statements(ast.walk(tree)) for path, tree in trees.items()}
    raises = sum(isinstance(node, ast.Raise) for tree in trees.values() for node in ast.walk(tree))
    functions = [(node.end_lineno - node.lineno + 1, path, node.name) for path, tree in trees.items()
                 for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]  # fmt: skip
    long_functions = sorted((size for size in functions if size[0] > 50), reverse=True)
    roof, flags = imports_of_the_roof(trees), flags_in_strings(trees)
    twice = [name for name, count in definitions(trees).items() if count > 1]
    listed = {
        "packages in a circle": packages_in_circles(trees),
        "imports that point up": arrows_up(trees, PACKAGES),
        "functions below the scripts that take `Run`": functions_with_run(trees),
        "calls of `Run.changed`": changes_of_run(trees),
        "packed assignments": packed_assignments(trees),
        "products of a text or a list and a boolean": products_with_booleans(trees),
        "vague names": vague_names(trees),
    }
    return [
        *(line for title, found in listed.items() for line in (f"{title}: {len(found)}", *(f"  {x}" for x in found))),
        f"lines of method and loop: {read.total():,}",
        *(f"  {count} {path}" for path, count in read.items()),
        f"lines of what left them: {beside.total():,}",
        *(f"  {count} {path}" for path, count in beside.items()),
        f"modules below the roof that import mae.cli or argparse: {len(roof)}",
        *(f"  {path}" for path in roof),
        f"flags in strings below the roof: {flags.total()}",
        *(f"  {count} {path}" for path, count in flags.most_common()),
        f"settings with several definitions: {len(twice)}",
        *(f"  {name}" for name in twice),
        f"statements outside of tests: {sum(sizes.values()):,}",
        *(f"  {count} {path}" for path, count in sorted(sizes.items())),
        f"raise statements: {raises}",
        f"functions above 50 lines: {len(long_functions)}",
        *(f"  {count} {path} {name}" for count, path, name in long_functions),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", action="store_true", help="omit the numbers of runs, which take a minute")
    print("\n".join(report()))
    if not parser.parse_args().static:
        from traces import report as traced

        for title, entries in traced().items():
            print("\n".join([f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries)]))
