"""Flags, defaults and recipes."""

import argparse
import copy
import json
import pickle
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import main_finetune
import main_linprobe
import main_pretrain
from inference import features, predict
from util import datasets
from util.cli import entry_point, flags
from util.cli.advice import AdvisedError, Remedy
from util.cli.flags import not_in_recipes
from util.data import resize
from util.interrupts import Interrupted
from util.jobs import submit


def parse(*argv):
    return entry_point.parse(main_pretrain.get_args_parser(), argv)


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
    (flags.positive_int, ["1", "7"], ["0", "-1", "1.5"]),
    (flags.count, ["0", "7"], ["-1"]),
    (flags.non_negative, ["0", "0.5"], ["-0.1", "nan"]),
    (flags.positive, ["1e-9"], ["0", "-1", "nan"]),
    (flags.share, ["0", "1"], ["-0.1", "1.01"]),
    (flags.positive_share, ["0.1", "1"], ["0", "1.01"]),
    (flags.ratio, ["0", "0.99"], ["1", "-0.1"]),
    (flags.jpeg_quality, ["1", "100"], ["0", "101"]),
    (flags.count_or_all, ["0", "3", "all"], ["-1", "some"]),
    (flags.seed, ["0", str(2**32 - 1)], ["-1", str(2**32)]),
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
    args = parse(
        "--no_pin_mem", "--norm_pix_loss", "--local-rank", "3", "--input_size", "32", "48", "--patch_size", "8"
    )
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mask_ratio", "1.0"], r"--mask_ratio: must be in \[0, 1\), got 1.0"),
        (["--mask_ratio", "-0.5"], r"--mask_ratio: must be in \[0, 1\)"),
        (["--model", "mae_vit_basic"], "--model: invalid choice: 'mae_vit_basic'.*mae_vit_base_patch16"),
        (["--batch_size", "0"], "--batch_size: must be at least 1"),
        (["--input_size", "1", "2", "3"], "--input_size: takes one or two numbers"),
        (["--clip_grad", "-1"], "--clip_grad: must be above 0"),
        (["--std", "0"], "--std: must be above 0"),
        (["--hflip", "2"], r"--hflip: must be in \[0, 1\]"),
        (["--seed", "-1"], r"--seed: must be in \[0, 2\^32\)"),
        (["--blr=-1e-3"], "--blr: must be at least 0"),
        (["--epoch", "3"], "unrecognized arguments: --epoch; did you mean --epochs[?]$"),
        (["--batch-size=3"], "unrecognized arguments: --batch-size; did you mean --batch_size[?]$"),
        (["--zzz"], "unrecognized arguments: --zzz$"),
        (["--num_workers", "-1"], "--num_workers: must be at least 0, got -1"),
        (["--vis_every", "-1"], "--vis_every: must be at least 0"),
        (["--start_epoch", "-1"], "--start_epoch: must be at least 0"),
        (["--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--config", "https://a.org/b.yaml"], "--config https://a.org/b.yaml is a URL: download the file"),
        (["--resume", "s3://a/b.pth"], "--resume s3://a/b.pth is a URL: download the file, and give its path"),
        (["--data_path", "http://a.org/b.zip"], "--data_path http://a.org/b.zip is a URL"),
    ],
)
def test_invalid_flags_are_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    error, usage = capsys.readouterr().err.splitlines()  # two lines, the message first
    assert re.search(message, error)
    assert usage.startswith("usage: ")


def test_usage_names_the_module_of_python_m(monkeypatch):
    spec = SimpleNamespace(name="inference.predict", origin="/clone/inference/predict.py")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [spec.origin])
    assert predict.get_args_parser().format_usage().startswith("usage: python -m inference.predict --model FILE")
    monkeypatch.setattr(sys, "argv", ["/clone/resize.py"])
    assert resize.get_args_parser().format_usage() == "usage: resize.py FOLDER COPY [FLAGS]"


def test_usage_shows_the_required_flags(capsys):
    for module, needed in (predict, "--model FILE IMAGE [IMAGE ...]"), (features, "--model FILE --out FILE"):
        with pytest.raises(SystemExit):
            entry_point.parse(module.get_args_parser(), ["--modle", "x"])
        error, usage = capsys.readouterr().err.splitlines()
        assert error.endswith("unrecognized arguments: --modle; did you mean --model?")
        assert needed in usage


def test_urls_are_accepted_only_where_expected(capsys):
    assert parse("--dataset", "wds:https://a.org/{0..9}.tar").dataset == "wds:https://a.org/{0..9}.tar"
    assert parse("--dist_url", "tcp://a.org:1").dist_url == "tcp://a.org:1"
    with pytest.raises(SystemExit):  # also if the flag converts the URL to a path, which has a single slash
        entry_point.parse(resize.get_args_parser(), ["https://a.org/images", "copy"])
    assert "FOLDER https:/a.org/images is a URL" in capsys.readouterr().err


def test_settings_without_effect_warn(caplog):
    parse("--world_size", "8")
    assert "--world_size and --dist_on_itp have no effect" in caplog.text


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_flags_override_the_recipe_and_the_recipe_overrides_defaults(tmp_path):
    path = recipe(
        tmp_path, "epochs: 7\nblr: 1e-4\ninput_size: [16, 32]\nnorm_pix_loss: true\npin_mem: false\nlr: null\n"
    )
    args = parse("--config", path, "--epochs", "9")
    assert (args.epochs, args.blr, args.input_size) == (9, 1e-4, [16, 32])
    assert (args.norm_pix_loss, args.pin_mem, args.lr) == (True, False, None)
    assert parse("--epochs", "9", f"--config={path}").epochs == 9
    assert parse("--config", path, "--no_norm_pix_loss", "--pin_mem").norm_pix_loss is False


def test_explicit_settings_are_recorded(tmp_path):
    path = recipe(tmp_path, "epochs: 7\npin_mem: false\ninput_size: [16, 32]\nlr: null\nnorm_pix_loss: true\n")
    args = parse("--config", path, "--no_norm_pix_loss", "--batch_size=64", "--log_dir", "x", "--local-rank", "0")
    typed = {"config", "norm_pix_loss", "batch_size", "log_dir", "local_rank"}
    assert entry_point.explicit(args) == typed | {"epochs", "pin_mem", "input_size"}
    assert entry_point.explicit(parse()) == frozenset()
    # The `args` of checkpoints do not contain it; copies, also those of submitit's jobs, do.
    assert vars(args).keys() == vars(main_pretrain.get_args_parser().parse_args([])).keys()
    assert args == argparse.Namespace(**vars(args))
    for other in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert (other, entry_point.explicit(other)) == (args, entry_point.explicit(args))
    assert entry_point.explicit(argparse.Namespace(epochs=3, lr=None)) == {"epochs", "lr"}


def test_explicit_settings_with_required_flags_and_positionals(tmp_path):
    parser = entry_point.parser("A command.")
    parser.add_argument("--config")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--model", required=True)
    parser.set_defaults(topk=5)
    args = entry_point.parse(parser, ["a.png", "--config", recipe(tmp_path, "model: x.pth\n")])
    assert (args.images, args.model, args.topk) == (["a.png"], "x.pth", 5)
    assert entry_point.explicit(args) == {"images", "config", "model"}


def test_blr_on_the_command_line_replaces_the_rate_of_a_recipe(tmp_path):
    path = recipe(tmp_path, "lr: 1e-3\n")
    assert (parse("--config", path).lr, parse("--config", path, "--blr", "0.01").lr) == (1e-3, None)
    both = parse("--config", path, "--blr", "0.01", "--lr", "0.1")
    assert (both.lr, both.blr) == (0.1, 0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask_ration: 0.5\n", "no flag 'mask_ration'; did you mean mask_ratio?"),
        ("mask_ratio: 2\n", "argument --mask_ratio: must be in [0, 1), got 2"),
        ("model: vit_base\n", "argument --model: invalid choice"),
        ("blr: {a: 1}\n", "blr takes a plain value, or a list of plain values, not {'a': 1}"),
        ("mean: [[1, 2], 3]\n", "mean takes a plain value, or a list of plain values"),
        ("mean: [0.5, --download]\n", "mean takes a plain value, or a list of plain values"),
        ("epochs: [3, 4]\n", "epochs takes no value 4"),
        ("epochs: 2024-13-45\n", "argument --epochs: invalid int value: '2024-13-45'"),
        ("{" * 5000 + "\n", "is nested"),
        ("epochs: true\n", "epochs takes a value"),
        ("- epochs\n", "`flag: value` lines"),
        ("epochs: [1\n", "is not YAML"),
        ("config: other.yaml\n", "no flag 'config'"),
        ("!!python/object/apply:os.mkdir [/tmp/executed]\n", "is not YAML"),
    ],
)
def test_invalid_recipes_are_errors(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--config", path := recipe(tmp_path, text))
    error, usage = capsys.readouterr().err.splitlines()
    assert message in error
    assert f"--config {path}" in error
    assert usage.startswith("usage: ")


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe\x00", "is not YAML"), (None, "can't be read"), (b"a: \x07", "is not YAML")]
)
def test_unreadable_recipes_are_errors(content, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    if content is None:
        path.symlink_to("/proc/self/mem")  # a file that can't be read
    else:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        parse("--config", str(path))
    error = capsys.readouterr().err.splitlines()[0]
    assert message in error
    assert f"--config {path}" in error


def test_dates_in_recipes_are_text(tmp_path):
    assert parse("--config", recipe(tmp_path, "output_dir: 2024-01-31\n")).output_dir == "2024-01-31"


def test_errors_are_one_line_and_debug_shows_the_traceback(capsys, monkeypatch):
    def run(error, *flags):
        def main(args):
            raise error

        monkeypatch.setattr("sys.argv", ["main.py", *flags])
        with pytest.raises(SystemExit) as stop:
            entry_point.run(main, main_pretrain.get_args_parser())
        return stop.value.code, capsys.readouterr().err

    code, output = run(ValueError("--data_path: there is no folder x"))
    assert code == 1
    assert output.endswith("error: --data_path: there is no folder x\n")
    assert "Traceback" not in output
    assert "Traceback" in run(ValueError("x"), "--debug")[1]
    assert "halve --batch_size 64 and double --accum_iter" in run(torch.OutOfMemoryError("CUDA out of memory"))[1]
    code, output = run(KeyboardInterrupt())
    assert code == 130
    assert "--resume auto resumes from the newest checkpoint" in output
    with pytest.raises(RuntimeError, match="shapes do not fit"):  # an error of the program keeps its traceback
        run(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (Interrupted(15), 143, "--resume auto"),
        (Interrupted(2), 130, "--resume auto"),
        (OSError(28, "No space left on device", "/out/x"), 1, "/out/x: No space left on device"),
        (ZeroDivisionError("division"), 1, "division"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. More"), 1, "lower --num_workers"),
    ],
)
def test_exit_codes_state_how_a_run_ended(error, code, message, monkeypatch, capsys):
    """128 plus the number of the signal, as in a shell, or 1 for an error. Launchers use them to decide on restarts."""

    def main(args):
        raise error

    monkeypatch.setattr("sys.argv", ["main.py"])
    with pytest.raises(SystemExit) as stop:
        entry_point.run(main, main_pretrain.get_args_parser())
    assert stop.value.code == code
    assert message in capsys.readouterr().err


def test_remedies_name_only_flags_of_the_script(monkeypatch, capsys):
    def main(args):
        starts = [Remedy({flag: "A"}, "{} starts from it") for flag in ("finetune", "init_from")]
        raise AdvisedError("no", *starts, Remedy({}, "give another"), about={"data_path": "B"})

    for script, message in (
        (main_pretrain, "--data_path B: no: --init_from A starts from it; or give another"),
        (main_finetune, "--data_path B: no: --finetune A starts from it; or give another"),
        (datasets, "PATH B: no: give another"),
    ):
        monkeypatch.setattr("sys.argv", ["main.py"])
        with pytest.raises(SystemExit):
            entry_point.run(main, script.get_args_parser())
        assert capsys.readouterr().err.endswith(f"error: {message}\n")


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ([], "; the same command with --resume auto resumes "),
        (["--resume", "auto"], "; the same command resumes "),
        (["--eval", "--resume", "a.pth"], ""),
    ],
)
def test_an_interrupted_command_names_the_one_that_resumes(flags, remedy, capsys, monkeypatch):
    """An evaluation does not resume."""
    killed = RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. More")
    for error, end in ((KeyboardInterrupt(), "from the newest checkpoint"), (killed, "the run")):

        def main(args, error=error):
            raise error

        monkeypatch.setattr("sys.argv", ["main.py", *flags])
        with pytest.raises(SystemExit):
            entry_point.run(main, main_finetune.get_args_parser())
        instead = "; try again" if error is killed else "interrupted"
        assert capsys.readouterr().err.endswith(f"{remedy}{end}\n" if remedy else f"{instead}\n")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_error_names_the_batch_size(error, capsys, monkeypatch):
    def main(args):
        raise error

    parser = entry_point.parser("A main.")
    parser.add_argument("--batch_size", default=64)
    parser.add_argument("--accum_iter", default=1)
    monkeypatch.setattr("sys.argv", ["main.py"])
    with pytest.raises(SystemExit) as stop:
        entry_point.run(main, parser)
    assert stop.value.code == 1
    assert "out of memory: halve --batch_size 64 and double --accum_iter" in capsys.readouterr().err


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}'] * 9)}]\n" for name in "bcdefghijk"
)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "dataset: 'wds:pipe:touch {mark}'",
            "must not set dataset.* give --dataset 'wds:pipe:touch .*' on the command line",
        ),
        ("dataset: 'wds:{{p,q}}ipe:touch {mark}'", "must not set dataset"),
        ("dataset: 'wds:a.tar::pipe:touch {mark}'", "must not set dataset"),
        ("dataset: 'wds:https://a.org/b.tar::pipe:touch {mark}'", "must not set dataset"),
        ("dataset: \"wds:https://a.org/b';touch\t{mark};'.tar\"", "must not set dataset"),
        ("dataset: 'wds:gs://a/b.tar'", "must not set dataset"),
        (
            "dist_url: tcp://10.0.0.1:29500",
            "must not set dist_url.* give --dist_url tcp://10.0.0.1:29500 on the command",
        ),
        ("dist_backend: gloo", "must not set dist_backend.* give --dist_backend gloo on the command line"),
        ("download: true", "must not set download.* give --download on the command line"),
        ("mean: [0.5, '--dataset=wds:pipe:touch {mark}']", "plain value"),
        ('output_dir: "a\\e[2Jb"', r"output_dir contains a control character: a\\x1b\[2Jb"),
        ('comment: "a\\nb"', "no flag 'comment'"),
        (BOMB.replace("{", "{{").replace("}", "}}"), r"has an alias \(\*a\)"),
        ("a: " + "[" * 1000, "is nested"),
        ("mean: [" + "0.5, " * 5000 + "]", "25,008 characters"),
    ],
)
def test_untrusted_recipes_are_limited(recipe, message, tmp_path, capsys):
    """Recipes execute nothing and can't fill the memory."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.format(mark=tmp_path / "mark"))
    with pytest.raises(SystemExit):
        parse("--config", str(path))
    text = capsys.readouterr().err
    assert re.search(rf"{path}.*{message}", text), text
    assert text.replace("\n", "").isprintable()
    assert not (tmp_path / "mark").exists()


def test_a_flag_that_names_code_is_declared_once(tmp_path, capsys):
    """The declaration of a flag applies to all scripts and jobs that have it."""
    parser = entry_point.parser("A script.")
    parser.add_argument("--config", metavar="YAML")
    not_in_recipes(parser.add_argument("--encoder", nargs="+"))
    not_in_recipes(parser.add_argument("--set"), lambda value: value.startswith("py:"))
    shared = entry_point.parser("Another script.")
    for flag in parser._actions:
        shared._add_action(flag)
    for refused in ("encoder: [my.module:Encoder, b]", "set: 'py:my.module:Set'"):
        path = recipe(tmp_path, refused)
        with pytest.raises(SystemExit):
            entry_point.parse(copy.deepcopy(shared), ["--config", path])
        key, _, value = refused.partition(": ")
        remedy = f"give --{key} {value.strip(chr(39)).strip('[]').replace(',', '')} on the command line"
        error = capsys.readouterr().err.splitlines()[0]
        assert f"--config {path}: " in error
        assert remedy in error
    args = entry_point.parse(shared, ["--config", recipe(tmp_path, "encoder: null\nset: folder\n")])
    assert (args.encoder, args.set) == (None, "folder")


def test_a_job_refuses_recipes_with_commands_or_with_folders_of_code(tmp_path, capsys):
    for entry in ("slurm: setup=reboot", "job_dir: data", "shared_dir: data"):
        path = recipe(tmp_path, entry)
        parser, _ = submit.get_args_parser("main_pretrain")
        with pytest.raises(SystemExit):
            entry_point.parse(parser, ["--config", path])
        key, value = entry.split(": ")
        error = capsys.readouterr().err
        assert f"--config {path}: " in error
        assert f"--{key} {value} on the command line" in error
    parser, _ = submit.get_args_parser("main_pretrain")
    assert entry_point.parse(parser, ["--config", recipe(tmp_path, "partition: gpu")]).partition == "gpu"


def test_recipes_restrict_shards_and_the_command_line_does_not(tmp_path):
    path = tmp_path / "recipe.yaml"
    for shards in ("wds:data/{000..127}.tar", "wds:https://a.org:8080/{000..127}.tar", "hf:user/name"):
        path.write_text(f"dataset: '{shards}'")
        assert parse("--config", str(path)).dataset == shards
    assert parse("--config", str(path), "--dataset", "wds:pipe:cat a.tar").dataset == "wds:pipe:cat a.tar"
