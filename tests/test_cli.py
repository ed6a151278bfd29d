"""Flags, defaults and recipes."""

import argparse
import contextlib
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mains import fails, small_run

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
from mae.cli import entry_point
from mae.inference import features, predict, reconstruct, segment
from mae.interrupts import Interrupted
from mae.jobs import submit
from mae.settings import Run, types, values
from mae.settings.arguments import in_words
from models_mae import mae_vit_mini_patch4


def parse(*argv):
    return entry_point.parse_command(main_pretrain.get_args_parser(), list(map(str, argv)))[0]


@pytest.fixture
def refused(capsys):
    """Parses invalid flags; returns the lines of the message and of the usage."""

    def run(*argv, parser=None):
        with pytest.raises(SystemExit) as stop:
            entry_point.parse(parser or main_pretrain.get_args_parser(), list(map(str, argv)))
        assert stop.value.code == 2
        error, usage = capsys.readouterr().err.splitlines()
        assert usage.startswith("usage: ")
        return error, usage

    return run


def raising(error, file):
    """A function of a file that raises an error."""
    names = {"error": error}
    exec(compile("def main(args):\n    raise error", file, "exec"), names)
    return names["main"]


@pytest.fixture
def ended(capsys, monkeypatch):
    """Runs a script whose main function raises an error; returns the exit code and stderr."""

    def run(error, *flags, parser=None):
        main = raising(error, ROOT / "mae" / "raised.py")
        monkeypatch.setattr("sys.argv", ["main.py", *flags])
        with pytest.raises(SystemExit) as stop:
            entry_point.run(main, parser or main_pretrain.get_args_parser())
        return stop.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("script", [main_pretrain, main_finetune, main_linprobe])
def test_every_published_flag_takes_a_value(script):
    """A value other than the default is parsed with its type, under the published name."""
    words = {"model": "mae_vit_base_patch16" if script is main_pretrain else "vit_base_patch16", "remode": "const",
             "mixup_mode": "elem", "dist_url": "tcp://a:1"}  # fmt: skip
    lists = {"cutmix_minmax": [0.25, 0.5], "blr": [0.1, 0.5] if script is main_linprobe else 0.5}
    numbers = {"lr": 0.25, "clip_grad": 0.5, "color_jitter": 0.5, "warmup_epochs": 2.5}
    published = json.loads((ROOT / f"tests/golden/{script.__name__}.json").read_text())["published"]
    for flag, default in published.items():
        other = True if isinstance(default, bool) else {int: 3, float: 0.5, str: "text"}.get(type(default))
        expected = {**words, **lists, **numbers}.get(flag, other)
        values = [] if expected is True else expected if isinstance(expected, list) else [expected]
        value = getattr(script.get_args_parser().parse_args([f"--{flag}", *map(str, values)]), flag)
        assert (value, type(value)) == (expected, type(expected)), flag


LIMITS = [  # type, valid values, invalid values
    (types.positive_int, ["1", "7"], ["0", "-1", "1.5"]),
    (types.count, ["0", "7"], ["-1"]),
    (types.non_negative, ["0", "0.5"], ["-0.1", "nan"]),
    (types.positive, ["1e-9"], ["0", "-1", "nan"]),
    (types.share, ["0", "1"], ["-0.1", "1.01"]),
    (types.positive_share, ["0.1", "1"], ["0", "1.01"]),
    (types.ratio, ["0", "0.99"], ["1", "-0.1"]),
    (types.count_or_all, ["0", "3", "all"], ["-1", "some"]),
    (types.seed, ["0", str(2**32 - 1)], ["-1", str(2**32)]),
]


@pytest.mark.parametrize(("kind", "valid", "invalid"), LIMITS)
def test_types_of_values_have_limits(kind, valid, invalid):
    assert [kind(text) for text in valid] == [type(kind(text))(text) for text in valid]
    for text in invalid:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def test_log_dir_follows_output_dir():
    assert parse("--output_dir", "runs/a").log_dir == "runs/a"
    assert parse("--output_dir", "runs/a", "--log_dir=runs/b").log_dir == "runs/b"
    assert parse().log_dir == "./output_dir"


def test_published_spellings():
    args = parse("--no_pin_mem", "--norm_pix_loss", "--local-rank", 3, "--input_size", 32, 48, "--patch_size", 8)
    assert (args.pin_mem, args.norm_pix_loss, args.local_rank) == (False, True, 3)
    assert (args.input_size, args.patch_size) == ([32, 48], 8)
    assert parse("--pin_mem", "--local_rank", "1").local_rank == 1
    assert parse("--no_pin_mem", "--pin_mem", "--norm_pix_loss", "--no_norm_pix_loss").norm_pix_loss is False
    classifier = main_finetune.get_args_parser()
    assert classifier.parse_args(["--cls_token"]).global_pool is False
    assert classifier.parse_args(["--cls_token", "--global_pool"]).global_pool is True


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    actions = main_pretrain.get_args_parser()._actions
    for action in actions:
        assert action.help, action.dest
        assert action.option_strings[0] in text
        if action.nargs != 0:  # each has a default, or explains its absence
            values = action.default if isinstance(action.default, list) else [action.default]
            optional = action.default not in (None, "")
            assert not optional or f"(default: {' '.join(map(str, values))})" in re.sub(r"\s+", " ", text), action.dest
    assert "None" not in text
    titles = [line[:-1].partition(" ")[0] for line in text.splitlines() if re.fullmatch(r"\w.*:", line)]
    assert titles == ["options", "data", "augmentation", "model", "optimization", "evaluation", "run", "distributed"]
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(("argv", "message"), [
    ("--mask_ratio 1.0", "--mask_ratio"), ("--model mae_vit_basic", "--model: .*mae_vit_base_patch16"),
    ("--batch_size 0", "--batch_size"), ("--input_size 1 2 3", "--input_size"), ("--std 0", "--std"),
    ("--hflip 2", "--hflip"), ("--seed -1", "--seed"), ("--blr=-1e-3", "--blr"),
    ("--epoch 3", "--epoch; did you mean --epochs[?]$"), ("--batch-size=3", "did you mean --batch_size[?]$"),
    ("--zzz", "--zzz$"), ("--num_workers -1", "--num_workers"), ("--config nowhere.yaml", "nowhere.yaml"),
    ("--config pretrain_vit_bas", "did you mean pretrain_vit_base[?]$"),
    ("--config https://a.org/b.yaml", "URL"), ("--resume s3://a/b.pth", "--resume s3://a/b.pth .*URL"),
])  # fmt: skip
def test_invalid_flags_are_errors(argv, message, refused):
    assert re.search(message, refused(*argv.split())[0])


def test_urls_are_accepted_only_where_expected(refused):
    assert parse("--dataset", "wds:https://a.org/{0..9}.tar").dataset == "wds:https://a.org/{0..9}.tar"
    assert parse("--dist_url", "tcp://a.org:1").dist_url == "tcp://a.org:1"
    error, _ = refused("https://a.org/images", "--model", "a.pth", "--out", "b.npz", parser=features.get_args_parser())
    assert "FOLDER https://a.org/images is a URL" in error


def test_settings_without_effect_warn(caplog):
    parse("--world_size", "8")
    assert "`world_size` and `dist_on_itp` have no effect" in caplog.text


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_flags_override_the_recipe_and_the_recipe_overrides_defaults(tmp_path):
    text = "epochs: 7\nblr: 1e-4\ninput_size: [16, 32]\nnorm_pix_loss: true\npin_mem: false\nencoder: null\nlr: null\n"
    path = recipe(tmp_path, f"{text}output_dir: 2024-01-31\n")
    args = parse("--config", path, "--epochs", "9")
    assert (args.epochs, args.blr, args.input_size) == (9, 1e-4, [16, 32])
    assert (args.norm_pix_loss, args.pin_mem, args.lr, args.output_dir) == (True, False, None, "2024-01-31")
    assert parse("--epochs", "9", f"--config={path}").epochs == 9
    assert parse("--config", path, "--no_norm_pix_loss", "--pin_mem").norm_pix_loss is False


def test_a_tilde_is_the_home_folder_in_recipes_and_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("output_dir: ~/runs/a\ndata_path: ~/images\n")
    args = parse("--config", tmp_path / "recipe.yaml", "--init_from=~/start.pth")
    found = [args.output_dir, args.data_path, args.init_from]
    assert found == [str(tmp_path / name) for name in ("runs/a", "images", "start.pth")]


def test_a_name_is_a_recipe_of_the_project_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain_vit_base").mkdir()
    args = parse("--config", "pretrain_vit_base")
    assert Path(args.config) == ROOT / "recipes/pretrain_vit_base.yaml"
    assert args.model == "mae_vit_base_patch16"
    (tmp_path / "pretrain_vit_large").write_text("epochs: 3\n")
    assert (parse("--config", "pretrain_vit_large").epochs, parse().epochs) == (3, 400)


def test_repeated_lists_of_names_are_one_list_and_replace_the_list_of_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("extras: [month]\ninput_size: [32, 48]\n")
    flags = ("--model_args", "a=1", "--model_args", "b=2", "c=3", "--extras", "lat", "--extras", "lon")
    args = parse("--config", tmp_path / "recipe.yaml", *flags, "--input_size", 64, "--input_size", 96)
    assert (args.model_args, args.extras, args.input_size) == (["a=1", "b=2", "c=3"], ["lat", "lon"], 96)


def test_explicit_settings_are_recorded(tmp_path):
    text = "epochs: 7\npin_mem: false\ninput_size: [16, 32]\nlr: null\nnorm_pix_loss: true\n"
    path = recipe(tmp_path, f"{text}processes: 2\n")  # `mae start` starts them
    argv = ["--config", path, "--no_norm_pix_loss", "--batch_size=64", "--log_dir", "x", "--local-rank", "0"]
    run = entry_point.parse(main_pretrain.get_args_parser(), list(map(str, argv)))
    typed = {"config", "norm_pix_loss", "batch_size", "log_dir", "local_rank"}
    assert run.explicit == typed | {"epochs", "pin_mem", "input_size"}
    assert entry_point.parse(main_pretrain.get_args_parser(), []).explicit == frozenset()
    # The `args` of checkpoints have the settings of the script only.
    assert run.record().keys() == vars(main_pretrain.get_args_parser().parse_args([])).keys()
    assert run.record() == vars(parse(*argv))
    assert pickle.loads(pickle.dumps(run)) == run
    assert Run.of(argparse.Namespace(epochs=3, lr=None)).explicit == {"epochs", "lr"}


@pytest.mark.parametrize(("entry", "expected"), [
    ("output_dir: 2024_11_28", "2024_11_28"), ("output_dir: 1.10", "1.10"), ("output_dir: 1_000", "1_000"),
    ("output_dir: 0x10", "0x10"), ("output_dir: 1:30", "1:30"), ("output_dir: 007", "007"), ("output_dir: no", "no"),
    ("output_dir: 2024-01-31", "2024-01-31"), ("output_dir: True", "True"), ("output_dir: '010'", "010"),
    ("output_dir: 'null'", "null"), ("output_dir: ~", "./output_dir"), ("seed: 010", 10), ("seed: 1_000", 1000),
    ("blr: 1e-3", 1e-3), ("mean: [010, 1.5]", [10.0, 1.5]), ("norm_pix_loss: TRUE", True),
    ("pin_mem: false", False), ("amp: off", "off"), ("probe_path: 1.0", "1.0"),
])  # fmt: skip
def test_a_recipe_means_what_the_command_line_means(entry, expected, tmp_path):
    name = entry.partition(":")[0]
    assert getattr(parse("--config", recipe(tmp_path, entry)), name) == expected


@pytest.mark.parametrize("value", [
    "a", "010", "true", "null", "~", "", "no", "1:30", "it's", "a b", "a: b", "a #b", "#b", "[a]", "a,b", "*a", "&a",
    "-", "-1", "- a", "?", "a:", ".", "wds:s/{000..127}.tar", "py:m:f", "~/runs", "a\\b", "%a", "@a", "!a", "|", ">",
    "=", "<<", ["a", "1", "b:c", "", "x, y"], True, False, 7, 1e-05, -0.5, [0.5, 1e-9],
])  # fmt: skip
def test_values_in_messages_and_recipes_are_read_as_they_are_written(value):
    texts = [str(one) for one in value] if isinstance(value, list) else str(value)
    read = values.read_recipe(f"name: {values.as_yaml(value)}  # a comment")["name"]
    assert read == (texts.lower() if isinstance(value, bool) else texts)


def test_settings_in_python_have_those_of_the_recipe(tmp_path):
    """Also of argparse's method, which a script of a fork calls."""
    argv = ["--config", recipe(tmp_path, "data_path: images\nepochs: 7\nmask_ratio: 0.6\n"), "--epochs", "3"]
    args = main_pretrain.get_args_parser().parse_args(argv)
    run = entry_point.parse(main_pretrain.get_args_parser(), argv)
    assert (args.data_path, args.epochs, args.mask_ratio) == ("images", 3, 0.6)
    assert vars(args) == run.record()


def test_values_are_written_as_a_recipe_has_them():
    found = {"labels": ["100", "1000"], "global_pool": False, "mask_ratio": 0.99, "mean": None, "mask": "a b"}
    assert in_words(found) == "labels=[100, 1000] global_pool=false mask_ratio=0.99 mean=null mask='a b'"


def test_explicit_settings_with_required_flags_and_positionals(tmp_path):
    parser = entry_point.parser("A command.")
    parser.add_argument("--config")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--model", required=True)
    parser.set_defaults(topk=5)
    args, explicit = entry_point.parse_command(parser, ["a.png", "--config", recipe(tmp_path, "model: x.pth\n")])
    assert (args.images, args.model, args.topk) == (["a.png"], "x.pth", 5)
    assert explicit == {"images", "config", "model"}


def test_blr_on_the_command_line_replaces_the_rate_of_a_recipe(tmp_path):
    path = recipe(tmp_path, "lr: 1e-3\n")
    assert (parse("--config", path).lr, parse("--config", path, "--blr", "0.01").lr) == (1e-3, None)
    both = parse("--config", path, "--blr", "0.01", "--lr", "0.1")
    assert (both.lr, both.blr) == (0.1, 0.01)


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}'] * 9)}]\n" for name in "bcdefghijk"
)


@pytest.mark.parametrize(("text", "message"), [
    ("mask_ration: 0.5", r"no flag 'mask_ration'; did you mean mask_ratio\?"),
    ("mask_ratio: 2", "--mask_ratio"), ("model: vit_base", "--model"), ("blr: {a: 1}", "blr"),
    ("mean: [[1, 2], 3]", "mean"), ("mean: [0.5, --download]", "mean"),
    ("mean: [0.5, '--dataset=wds:pipe:touch MARK']", "mean"), ("epochs: [3, 4]", "epochs"),
    ("epochs: 2024-13-45", "--epochs"), ("epochs: true", "epochs"),
    ("- epochs", "`flag: value` lines"),
    ("epochs: [1", "is no recipe"),
    ("config: other.yaml", "no flag 'config'"),
    ("!!python/object/apply:os.mkdir [MARK]", "is no recipe"),
    (b"\xff\xfe\x00", "is no recipe"),
    (b"a: \x07", "is no recipe"),
    (None, "can't be read"),
    ("dataset: 'wds:pipe:touch MARK'", "must not set dataset.* --dataset 'wds:pipe:touch .*' on the command line"),
    ("dataset: 'wds:{p,q}ipe:touch MARK'", "must not set dataset"),
    ("dataset: 'wds:a.tar::pipe:touch MARK'", "must not set dataset"),
    ("dataset: 'wds:https://a.org/b.tar::pipe:touch MARK'", "must not set dataset"),
    ("dataset: \"wds:https://a.org/b';touch\tMARK;'.tar\"", "must not set dataset"),
    ("dataset: 'wds:gs://a/b.tar'", "must not set dataset"),
    ("dist_url: tcp://10.0.0.1:29500", "must not set dist_url.* --dist_url tcp://10.0.0.1:29500 on the command"),
    ("dist_backend: gloo", "must not set dist_backend.* --dist_backend gloo on the command line"),
    ("download: true", "must not set download.* --download on the command line"),
    ("encoder: [my.module:Encoder, b]", "encoder.* --encoder my.module:Encoder b on the command line"),
    ("model_class: my.module:Model", "model_class.* --model_class my.module:Model on the command line"),
    ('output_dir: "a\\e[2Jb"', r"output_dir contains a control character: a\\x1b\[2Jb"),
    ('comment: "a\\nb"', "no flag 'comment'"),
    (BOMB, r"has an alias \(\*a\)"),
    ("a: " + "[" * 1000, "is no recipe"),
    ("{" * 400, "is no recipe"),
    ("mean: [" + "0.5, " * 5000 + "]", "25,008 characters"),
    ("norm_pix_loss: on", "norm_pix_loss takes true or false"),
    ("epochs: 3\nlr: 1\nepochs: 4", "has epochs twice"),
    ("processes: 0", "processes=0"), ("processes: [2]", "processes"),
], ids=range(38))  # fmt: skip
def test_invalid_recipes_are_errors(text, message, tmp_path, refused):
    """Recipes execute nothing and can't fill the memory."""
    path = tmp_path / "recipe.yaml"
    if text is None:
        path.symlink_to("/proc/self/mem")  # a file that can't be read
    else:
        content = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(content.replace(b"MARK", bytes(tmp_path / "mark")))
    error, usage = refused("--config", path)
    assert re.search(f"--config {path}.*{message}", error)
    assert (error + usage).isprintable()
    assert not (tmp_path / "mark").exists()


def test_errors_are_one_line_and_debug_shows_the_traceback(ended):
    code, output = ended(ValueError("--data_path: there is no folder x"))
    assert code == 1
    assert output.endswith("error: --data_path: there is no folder x\n")
    assert "Traceback" not in output
    assert "Traceback" in ended(ValueError("x"), "--debug")[1]
    with pytest.raises(RuntimeError, match="shapes"):  # an error of the program keeps its traceback
        ended(RuntimeError("shapes do not fit"))


KILLED = RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. More")
CPU_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(("error", "code", "message"), [
    (Interrupted(15), 143, "--resume auto"),
    (Interrupted(2), 130, "--resume auto"),
    (KeyboardInterrupt(), 130, "--resume auto"),
    (OSError(28, "No space left on device", "/out/x"), 1, "/out/x: No space left on device"),
    (ZeroDivisionError("division"), 1, "division"),
    (KILLED, 1, "lower `num_workers`"),
    *((memory, 1, "out of memory: halve batch_size=64 and double `accum_iter`")
      for memory in (MemoryError(), CPU_MEMORY, torch.OutOfMemoryError("CUDA out of memory"))),
])  # fmt: skip
def test_exit_codes_state_how_a_run_ended(error, code, message, ended):
    """128 plus the number of the signal, as in a shell, or 1 for an error. Launchers use them to decide on restarts."""
    found, output = ended(error)
    assert found == code
    assert message in output


def test_standard_error_may_be_closed(pictures, tmp_path, capsys, monkeypatch):
    """As by 2>&-: Python has no stream then. Errors go to standard output."""
    run = small_run(pictures, tmp_path / "run", "--epochs", 1, "--batch_size", 8)
    for wrong, code in (["--epoch", "2"], 2), (["--data_path", "not_there"], 1), ([], 0):
        monkeypatch.setattr("sys.argv", ["main_pretrain.py", *run, *wrong])
        monkeypatch.setattr("sys.stderr", None)
        with pytest.raises(SystemExit) if code else contextlib.nullcontext() as stop:
            entry_point.run(main_pretrain.main, main_pretrain.get_args_parser())
        output = capsys.readouterr().out
        assert not code or (stop.value.code, [w for w in wrong[:1] if w.removeprefix("--") not in output]) == (code, [])
    assert (tmp_path / "run/checkpoint-0.pth").exists()


def test_a_missing_optional_package_is_one_line(ended):
    """Other imports are of the user's code, and keep their traceback."""
    code, output = ended(ModuleNotFoundError("No module named 'datasets'", name="datasets"))
    assert (code, output.count("\n"), "pip install datasets" in output) == (1, 1, True)
    with pytest.raises(ModuleNotFoundError):
        ended(ModuleNotFoundError("No module named 'mine'", name="mine"))


@pytest.mark.parametrize(("flags", "remedy"), [
    ([], "; the same command with --resume auto resumes "),
    (["--resume", "auto"], "; the same command resumes "),
    (["--eval", "--resume", "a.pth"], ""),
])  # fmt: skip
def test_an_interrupted_command_names_the_one_that_resumes(flags, remedy, ended):
    """An evaluation does not resume."""
    for error, end, instead in ((KeyboardInterrupt(), "from the newest checkpoint", "interrupted"),
                                (KILLED, "the run", "; try again")):  # fmt: skip
        output = ended(error, *flags, parser=main_finetune.get_args_parser())[1]
        assert output.endswith(f"{remedy}{end}\n" if remedy else f"{instead}\n")


MISSING = [
    (main_pretrain, "--data_path", []), (main_pretrain, "--train_list", []), (main_pretrain, "--init_from", []),
    (main_pretrain, "--resume", []), (main_pretrain, "--probe_path", ["--probe_every", 1, "--data_path", "IMAGES"]),
    (main_pretrain, "--dataset", []), (main_finetune, "--data_path", []), (main_finetune, "--finetune", []),
    (main_linprobe, "--val_list", ["--data_path", "IMAGES"]), (main_knn, "--data_path", []),
    (main_segment, "--data_path", ["--nb_classes", 2]), (features, None, ["--model", "mae.pth", "--out", "out.npz"]),
    (features, "--dataset", ["--model", "mae.pth", "--out", "out.npz"]), (predict, None, ["--model", "mae.pth"]),
    (reconstruct, None, ["--model", "mae.pth", "--out", "out.png"]), (segment, None, ["--model", "mae.pth"]),
]  # fmt: skip


@pytest.mark.parametrize(("script", "flag", "others"), MISSING)
def test_what_is_missing_is_named_before_a_model_is_built(
    script, flag, others, pictures, tmp_path, capsys, monkeypatch
):
    """A large model takes several seconds."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": mae_vit_mini_patch4(img_size=16).state_dict()}, "mae.pth")

    def build(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(torch.nn.Linear, "__init__", build)
    argv = [pictures if value == "IMAGES" else value for value in others] + [flag] * bool(flag) + ["not_there"]
    assert "not_there" in fails(capsys, monkeypatch, script, *argv, "--device", "cpu")


def test_a_job_refuses_recipes_with_commands_or_with_folders_of_code(tmp_path, refused):
    for key, value in (("slurm", "setup=reboot"), ("job_dir", "data"), ("shared_dir", "data"), ("encoder", "a:B")):
        path = recipe(tmp_path, f"{key}: {value}")
        error, _ = refused("--config", path, parser=submit.get_args_parser("main_pretrain")[0])
        assert f"--config {path}: " in error and f"--{key} {value} on the command line" in error
    parser, _ = submit.get_args_parser("main_pretrain")
    assert entry_point.parse_command(parser, ["--config", recipe(tmp_path, "partition: gpu")])[0].partition == "gpu"


def test_recipes_restrict_shards_and_the_command_line_does_not(tmp_path):
    for shards in ("wds:data/{000..127}.tar", "wds:https://a.org:8080/{000..127}.tar", "hf:user/name"):
        path = recipe(tmp_path, f"dataset: '{shards}'")
        assert parse("--config", path).dataset == shards
    assert parse("--config", path, "--dataset", "wds:pipe:cat a.tar").dataset == "wds:pipe:cat a.tar"


def test_numbers_with_a_negative_exponent_are_values():
    args = parse("--data_path", "x", "--value_range", "-1e-4", "1e-4")
    assert args.value_range == [-1e-4, 1e-4]
