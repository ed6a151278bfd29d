"""Remedies in error messages can be typed: they name only flags of the script that prints them."""

import argparse
import ast
import functools
import re

import pytest
from test_architecture import imports, modules

import main_compare
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_robustness
import main_segment
from inference import export, features, predict, reconstruct, segment
from util import datasets
from util.cli import advice, entry_point
from util.data import resize
from util.jobs import submit

SCRIPTS = (main_compare, main_finetune, main_knn, main_linprobe, main_pretrain, main_robustness, main_segment,
           export, features, predict, reconstruct, segment, datasets, resize)  # fmt: skip
PARSERS = {script.__name__: script.get_args_parser() for script in SCRIPTS}
PARSERS |= {f"submitit_{task}": submit.get_args_parser(f"main_{task}")[0] for task in ("pretrain", "finetune")}
FLAG = r"(?<![\w-])--(?=[a-z])[\w-]+"
OF_ANOTHER = re.compile(rf"\w+\.py {FLAG}")  # a flag of the script that is named
OTHERS = {
    "--nproc_per_node",
    "--master_port",
    "--kill-on-bad-exit",
    "--cpus-per-task",
    "--job",
    "--help",
    "--shm-size",
}  # torchrun's, Slurm's, all, Docker's
FORMATS = {"{split}": "train"} | {f"--{{{part}}}": "--model" for part in ("flag", "name", "key")}  # of any setting
# Messages that some scripts can reach by the syntax trees, but not at run time.
ELSEWHERE = {
    r"util\.cli\.(entry_point|advice)\.\w*": "it looks whether the script has the flag",
    r"util\.(data\.(torchvision_sets|huggingface_sets|webdataset_shards)|datasets)\.(\w+Set|Shards|open_source)": (
        r"inference\.features|main_robustness", "opens folders and archives only, no --dataset and no list"),
    r"util\.datasets\.open_source": (
        r"(?!main_pretrain|submitit_pretrain|util\.datasets).*", "only pre-training streams, and has --num_images"),
    r"util\.datasets\.report_on": (r"util\.datasets", "it prints what to give to other scripts"),
    r"util\.data\.loader\.updates_per_epoch": (r"main_knn", "it trains nothing"),
    r"util\.(data\.loader\.EpochBatches|dist\.shard|training\.trainer\.(run|_require_usable))": (
        r"(?!main_pretrain|submitit_pretrain).*", "only pre-training has --repeated_sampling, --fsdp"),
    r"util\.data\.jpeg\.\w+": (
        r"main_(segment|compare)|submitit_segment|inference\.(?!features)\w+|util\.\w+", "it has no --fast_jpeg"),
    r"util\.data\.image_cache\.\w+": (
        r"(?!(main|submitit)_(pretrain|finetune|linprobe)).*", "only training of these kinds has --cache_images"),
    r"util\.data\.samples\.Samples": (
        r"main_knn|main_robustness|inference\.\w+", "it names --on_bad_image where the script has given that"),
    r"models_build\.(set_probe_head|attentive_head|AttentivePool)": (
        r"main_robustness|inference\.\w+", "a probe's settings are a file's, and were checked when it was trained"),
    r"util\.(data\.(samples|labels|transforms)|weights\.loading)\.\w+": (
        r"main_compare", "the scripts that it starts have the flag"),
    r"util\.data\.decode\._(check_channels|channel_axis)": "Samples.refuse adds it where the script has --on_bad_image",
    r"util\.data\.torchvision_sets\.dataset_in": (r"main_robustness|inference\.\w+", "a note, as of `advised`"),
    r"models_build\._set_options": "of the blocks of a subclass, which main_pretrain.py trains",
    r"util\.checkpoints\.run_directory\._require_new": (r"main_compare", "it always resumes"),
    r"util\.data\.transforms\.\w+": (
        r"main_robustness|inference\.\w+", "the statistics are a file's, checked when read"),
    r"util\.checkpoints\.run_state\._warn_of_changes": "of settings that the script has",
    r"util\.weights\.loading\.statistics": (r"main_robustness|inference\.\w+", "another of this name is meant"),
    r"engine_finetune\.Setup|util\.(datasets\.open_source|data\.(webdataset_shards|labels)\.\w+)": (
        r"main_segment", "it opens pairs of images and masks"),
    r"util\.training\.loop\.NonFiniteGuard": (r"main_segment", "its --lr has a default"),
    r"util\.data\.labels\.require": (r"inference\.features", "a file list is not among its flags"),
}  # fmt: skip


@functools.cache
def definitions() -> dict[str, list[tuple[str, ast.AST]]]:
    """Maps every name that a module defines to module and definition."""
    found: dict[str, list[tuple[str, ast.AST]]] = {}
    for module, file in modules().items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign | ast.AnnAssign):
                names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
            for name in names:
                found.setdefault(name, []).append((module, node))
    return found


@functools.cache
def names_in(node: ast.AST) -> set[str]:
    parts = list(ast.walk(node))
    return {p.id for p in parts if isinstance(p, ast.Name)} | {p.attr for p in parts if isinstance(p, ast.Attribute)}


@functools.cache
def graph() -> dict[str, set[str]]:
    return {name: imports(file) & modules().keys() for name, file in modules().items()}


def reached(script: str) -> list[tuple[str, ast.AST]]:
    """The definitions that a script can reach, by name, in its imports."""
    starts = {script, script.replace("submitit_", "main_"), "util.cli.entry_point"}
    waiting = [(m, node) for name in ("main", "run", "parse") for m, node in definitions()[name] if m in starts]
    seen = {}
    while waiting:
        module, node = waiting.pop()
        if id(node) not in seen:
            seen[id(node)] = module, node
            reachable = graph()[module] | {module}
            waiting += [(m, other) for name in names_in(node) for m, other in definitions().get(name, [])
                        if m in reachable]  # fmt: skip
    return list(seen.values())


def messages(node: ast.AST) -> list[tuple[str, bool]]:
    """The texts of a definition, and whether they are remedies, which only scripts with their flags print."""
    passed_over, remedies = set(), set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and isinstance(part.body[0], ast.Expr):
            passed_over.add(id(part.body[0].value))  # docstring
        elif isinstance(part, ast.JoinedStr):
            passed_over |= {id(inner) for inner in ast.walk(part)} - {id(part)}
        elif isinstance(part, ast.Call):
            name = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", "")
            if name in ("add_argument", "parser"):  # help: `test_help_names_flags_of_the_script`
                passed_over |= {id(inner) for inner in ast.walk(part)}
            elif name == "advised":
                remedies |= {id(inner) for argument in part.args[1:] for inner in ast.walk(argument)}
    texts = []
    for part in ast.walk(node):
        if id(part) not in passed_over and isinstance(part, ast.JoinedStr):
            text = ast.unparse(part).removeprefix("f")[1:-1]
            texts.append((text, id(part) in remedies))
        elif id(part) not in passed_over and isinstance(part, ast.Constant) and isinstance(part.value, str):
            texts.append((part.value, id(part) in remedies))
    return texts


def flags_of(script: str) -> dict:
    """The flags of a script, and its positional arguments, which `entry_point.run` names by their metavar."""
    parser = PARSERS[script]
    return parser._option_string_actions | {f"--{a.dest}": a for a in parser._actions if not a.option_strings}


def wrong(text: str, script: str) -> list[str]:
    """The flags with values in a text that the parser of a script rejects."""
    for marker, name in FORMATS.items():
        text = text.replace(marker, name)
    known, found = flags_of(script), []
    for match in re.finditer(rf"({FLAG})(?: ([\w.]*\w))?", OF_ANOTHER.sub("", text)):
        flag, value = match.groups()
        action = known.get(flag)
        if flag not in OTHERS and action is None:
            found.append(flag)
        elif action and value and (action.choices or value[0].isdigit()):  # else it is prose, or a placeholder
            parser = PARSERS[script]
            try:
                parser._get_values(action, [value])
            except argparse.ArgumentError:
                found.append(match[0])
        elif value in ("True", "False"):
            found.append(match[0])
    return found


@pytest.mark.parametrize("script", PARSERS)
def test_messages_name_flags_of_their_script(script):
    mistakes = []
    for module, node in reached(script):
        place = f"{module}.{getattr(node, 'name', '')}"
        reasons = [who for pattern, who in ELSEWHERE.items() if re.fullmatch(pattern, place)]
        if any(isinstance(who, str) or re.fullmatch(who[0], script) for who in reasons):
            continue
        mistakes += [f"{place}: {flag} in {text!r}" for text, is_remedy in messages(node) if not is_remedy
                     for flag in wrong(text, script)]  # fmt: skip
    assert mistakes == []


def test_every_remedy_names_flags_of_a_script():
    remedies = {(text, script) for script in PARSERS for _, node in reached(script)
                for text, is_remedy in messages(node) if is_remedy and "--" in text}  # fmt: skip
    accepted = {text for text, script in remedies if not wrong(text, script)}
    assert {text for text, _ in remedies} == accepted
    assert len(accepted) >= 5


@pytest.mark.parametrize("script", PARSERS)
def test_help_names_flags_of_the_script(script):
    known = flags_of(script)
    for action in PARSERS[script]._actions:
        assert [flag for flag in re.findall(FLAG, OF_ANOTHER.sub("", action.help or "")) if flag not in known] == [], (
            action.dest
        )


def test_an_unknown_flag_in_a_message_is_reported():
    assert wrong("lower --bolr", "main_pretrain") == ["--bolr"]
    assert wrong("--amp no", "main_pretrain") == ["--amp no"]
    assert wrong("--batch_size 0", "main_pretrain") == ["--batch_size 0"]
    assert wrong("try --clip_grad 1.0, --amp off.", "main_pretrain") == []
    assert wrong("give --global_pool True", "main_finetune") == ["--global_pool True"]
    assert wrong("--on_bad_image skip leaves it out", "main_knn") == ["--on_bad_image"]
    assert wrong("main_pretrain.py --on_bad_image skip leaves it out", "main_knn") == []


def test_settings_are_formatted_as_on_the_command_line():
    settings = {"model": "vit_mini_patch4", "patch_size": [7, 7], "in_chans": 1, "global_pool": False, "pin_mem": False}
    typed = "--model vit_mini_patch4 --patch_size 7 7 --in_chans 1 --cls_token --no_pin_mem"
    assert advice.remedy(settings) == f"give {typed}"
    args = vars(entry_point.parse(main_finetune.get_args_parser(), typed.split()))
    assert {name: args[name] for name in settings} == settings
    omitting = {"unfreeze_blocks": None, "norm_pix_loss": True}
    assert advice.remedy(omitting) == "give --norm_pix_loss and omit --unfreeze_blocks"
    assert advice.remedy({"unfreeze_blocks": None}) == "omit --unfreeze_blocks"
    settings = {"global_pool": False, "k": [5, 20], "mean": None, "pin_mem": False, "config": "my recipe.yaml"}
    assert advice.arguments(settings) == ["--cls_token", "--k", "5", "20", "--no_pin_mem", "--config", "my recipe.yaml"]
