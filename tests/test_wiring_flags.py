"""Every flag of every script with its default: those of the published code, and those that this library adds."""

import argparse

import pytest

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_robustness
import main_segment
from inference import export, features, predict, reconstruct, segment
from util import datasets
from util.cli import entry_point, flags
from util.cli.advice import advised
from util.data import resize
from util.jobs import submit

RECIPE = "rand-m9-mstd0.5-inc1"
COMMON = {
    "accum_iter": 1, "input_size": 224, "lr": None, "output_dir": "./output_dir", "log_dir": "./output_dir",
    "seed": 0, "resume": "", "start_epoch": 0, "num_workers": 10, "pin_mem": True, "world_size": 1, "local_rank": -1,
    "dist_on_itp": False, "dist_url": "env://", "data_path": None, "device": "auto",
}  # fmt: skip
PRETRAIN = COMMON | {
    "batch_size": 64, "epochs": 400, "model": "mae_vit_large_patch16", "mask_ratio": 0.75, "norm_pix_loss": False,
    "weight_decay": 0.05, "blr": 1e-3, "min_lr": 0.0, "warmup_epochs": 40,
}  # fmt: skip
SUPERVISED = COMMON | {"model": "vit_large_patch16", "finetune": "", "nb_classes": None, "eval": False,
                       "dist_eval": False}  # fmt: skip
FINETUNE = SUPERVISED | {
    "batch_size": 64, "epochs": 50, "drop_path": 0.1, "clip_grad": None, "weight_decay": 0.05, "blr": 1e-3,
    "layer_decay": 0.75, "min_lr": 1e-6, "warmup_epochs": 5, "color_jitter": None, "aa": RECIPE, "smoothing": 0.1,
    "reprob": 0.25, "remode": "pixel", "recount": 1, "resplit": False, "mixup": 0.0, "cutmix": 0.0,
    "cutmix_minmax": None, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "global_pool": True,
}  # fmt: skip
LINPROBE = SUPERVISED | {
    "batch_size": 512, "epochs": 90, "weight_decay": 0.0, "blr": [0.1], "min_lr": 0.0, "warmup_epochs": 10,
    "global_pool": False,
}  # fmt: skip
JOB = {"ngpus": 8, "nodes": 2, "timeout": 4320, "job_dir": "", "partition": None, "use_volta32": False, "comment": ""}

# Flags that the published code does not have.
SOURCE = {"train_list": None, "dataset": None, "download": False, "in_chans": 3, "num_workers": 10}
INPUT = SOURCE | {"mean": None, "std": None, "patch_size": None, "num_cls_tokens": None}
DATA = INPUT | {"fast_jpeg": False, "crop": "random"}
CROPS = {"hflip": 0.5, "vflip": 0.0, "rotate90": False, "crop_ratio": [3 / 4, 4 / 3]}
COMPUTE = {"config": None, "debug": False, "amp": "auto", "dist_backend": "auto", "dist_timeout": 600}
TRAINING = COMPUTE | {
    "save_minutes": 15.0, "keep_last": None, "clip_grad": None, "compile": False, "on_nonfinite": "abort",
    "on_bad_image": "error",
}  # fmt: skip
RUN = DATA | TRAINING | {"cache_images": False}
CLASSES = {"adapt_input": "error", "val_list": None, "crop_pct": None, "train_per_class": None, "val_fraction": None}
EVALUATION = CLASSES | {"eval_every": 1, "report": None, "save_every": 1}
MODEL = {"model": None, "device": "auto", "debug": False}
EXTRACTION = {"batch_size": 128, "num_workers": 10, "fast_jpeg": False, "amp": "auto", "compile": False}
OURS_JOB = {"shared_dir": "", "slurm": [], "after": None, "cluster": "slurm", "dry_run": False, "wait": False}

OURS = {
    main_pretrain: RUN | {
        "save_every": 20, "decoder_depth": None, "grad_checkpointing": False, "fsdp": False, "crop_scale": [0.2, 1.0],
        **CROPS, "repeated_sampling": 1, "init_from": "", "vis_every": 20,
        "masking": "random", "mask_block": 1, "learned_pos_embed": False, "drop_path": 0.0,
        "updates_per_epoch": None, "num_images": None,
    },
    main_finetune: RUN | EVALUATION | {
        "unfreeze_blocks": None, "grad_checkpointing": False, "crop_scale": [0.08, 1.0], **CROPS,
    },
    main_linprobe: RUN | EVALUATION | {
        "cache_features": False, "held_out": 0.1, "probe": "linear", "num_queries": 32,
    },
}  # fmt: skip
PUBLISHED = {main_pretrain: PRETRAIN, main_finetune: FINETUNE, main_linprobe: LINPROBE}
COMMANDS = {
    main_knn: DATA | COMPUTE | CLASSES | {
        "seed": 0, "device": "auto", "batch_size": 256, "data_path": None, "input_size": 224, "pin_mem": True,
        "model": "vit_large_patch16", "finetune": "", "nb_classes": None, "global_pool": False, "k": [10, 20, 100],
        "temperature": [0.07], "world_size": 1, "local_rank": -1, "dist_on_itp": False, "dist_url": "env://",
    },
    main_robustness: MODEL | EXTRACTION | {
        "suite": None, "data_path": None, "subset": None, "crop_pct": None, "output_dir": "runs/robustness",
        "world_size": 1, "local_rank": -1, "dist_on_itp": False, "dist_url": "env://", "dist_backend": "auto",
        "dist_timeout": 600,
    },
    main_segment: INPUT | TRAINING | COMMON | {
        "train_folders": None, "val_folders": None, "val_list": None, "nb_classes": None, "reduce_zero_label": False,
        "palette": None, "short_side": None, "batch_size": 16, "epochs": 60, "warmup_epochs": 0, "lr": 2e-4,
        "poly_power": 0.9, "min_lr": 0.0, "weight_decay": 0.01, "head": "linear", "finetune": "",
        "adapt_input": "error", "drop_path": 0.0, "layer_decay": 0.75, "unfreeze_blocks": 0,
        "grad_checkpointing": False, "scale": [0.5, 2.0], "hflip": 0.5, "eval": False, "eval_every": 1, "report": None,
        "dist_eval": False, "save_every": 1, "model": "vit_large_patch16",
    },
    predict: MODEL | {"images": None, "topk": 5, "json": False, "out": None},
    reconstruct: MODEL
    | {"images": None, "out": None, "mask_ratio": 0.75, "seed": 0, "mask_box": None, "short_side": None},
    features: MODEL | EXTRACTION | {"data_path": None, "out": None, "split": "train", "pool": None}
    | {"on_bad_image": "error"},
    segment: MODEL | {"images": None, "out": None, "opacity": 0.6, "masks": None},
    export: MODEL | {"to": None, "out": None, "encoder": False},
    datasets: SOURCE | {"num_images": None, "data_path": None, "val_list": None, "split": "train", "limit": None},
    resize: {"data_path": None, "copy": None, "short_side": 256, "quality": 90, "num_workers": 10},
}  # fmt: skip


def defaults(parser: argparse.ArgumentParser) -> dict:
    return {action.dest: parser.get_default(action.dest) for action in parser._actions}


def name(script) -> str:
    return script.__name__


@pytest.mark.parametrize("script", PUBLISHED, ids=name)
def test_every_default_of_a_script_is_the_published_one(script):
    parser = script.get_args_parser()
    assert defaults(parser) == PUBLISHED[script] | OURS[script]
    assert vars(entry_point.parse(parser, [])) == PUBLISHED[script] | OURS[script]


@pytest.mark.parametrize("script", PUBLISHED, ids=name)
def test_a_job_has_the_flags_of_its_script_and_its_own(script):
    parser, job_flags = submit.get_args_parser(script.__name__)
    expected = PUBLISHED[script] | OURS[script] | JOB | OURS_JOB | {"output_dir": "the job's folder"}
    assert defaults(parser) == expected
    assert set(job_flags) == {*JOB, *OURS_JOB}


@pytest.mark.parametrize("script", COMMANDS, ids=name)
def test_every_default_of_a_command(script):
    assert defaults(script.get_args_parser()) == COMMANDS[script]


@pytest.mark.parametrize("script", PUBLISHED, ids=name)
def test_every_published_flag_takes_a_value(script):
    """A value other than the default is parsed with its type, under the published name."""
    words = {
        "model": "mae_vit_base_patch16" if script is main_pretrain else "vit_base_patch16", "data_path": "/data",
        "output_dir": "/out", "log_dir": "/log", "device": "cpu", "resume": "a.pth", "finetune": "b.pth",
        "dist_url": "tcp://a:1", "aa": "rand-m5", "remode": "const", "mixup_mode": "elem",
    }  # fmt: skip
    numbers = {"lr": 0.25, "clip_grad": 0.5, "nb_classes": 7, "color_jitter": 0.5, "warmup_epochs": 2.5}
    parser = script.get_args_parser()
    for flag, default in PUBLISHED[script].items():
        argv, expected = [f"--{flag}", words.get(flag)], words.get(flag)
        if isinstance(default, bool):
            argv, expected = [f"--{flag}"], True
        elif flag == "cutmix_minmax":
            argv, expected = [f"--{flag}", "0.25", "0.5"], [0.25, 0.5]
        elif flag == "blr" and script is main_linprobe:
            argv, expected = ["--blr", "0.1", "0.5"], [0.1, 0.5]
        elif flag not in words:
            expected = numbers.get(flag, 3 if isinstance(default, int) else 0.5)
            argv[1] = str(expected)
        value = getattr(parser.parse_args(argv), flag)
        assert (value, type(value)) == (expected, type(expected)), flag


@pytest.mark.parametrize("script", PUBLISHED, ids=name)
def test_boolean_flags_turn_on_and_off(script):
    parser = script.get_args_parser()
    assert parser.parse_args(["--no_pin_mem"]).pin_mem is False
    assert parser.parse_args(["--no_pin_mem", "--pin_mem"]).pin_mem is True
    assert parser.parse_args(["--local-rank", "3"]).local_rank == 3
    if script is main_pretrain:
        assert parser.parse_args(["--norm_pix_loss", "--no_norm_pix_loss"]).norm_pix_loss is False
        assert parser.parse_args(["--fast_jpeg"]).fast_jpeg is True
    else:
        assert parser.parse_args(["--global_pool"]).global_pool is True
        assert parser.parse_args(["--cls_token"]).global_pool is False


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


def test_sizes_are_a_number_or_two():
    parser = main_pretrain.get_args_parser()
    assert parser.parse_args(["--input_size", "448"]).input_size == 448
    assert parser.parse_args(["--input_size", "32", "48"]).input_size == [32, 48]
    assert parser.parse_args(["--patch_size", "8", "4"]).patch_size == [8, 4]


def test_a_url_is_no_folder(capsys):
    """Also if the flag converts the URL to a path, which has a single slash."""
    with pytest.raises(SystemExit):
        entry_point.parse(resize.get_args_parser(), ["https://a.org/images", "copy"])
    assert "FOLDER https:/a.org/images is a URL: download the file" in capsys.readouterr().err


def test_exit_codes_state_how_a_run_ended(monkeypatch, capsys):
    """128 plus the number of the signal, as in a shell, or 1 for an error. Launchers use them to decide on restarts."""
    from util.interrupts import Interrupted

    for error, code, message in (
        (Interrupted(15), 143, "the state is saved; the same command with --resume auto resumes the run"),
        (Interrupted(2), 130, "the state is saved"),
        (OSError(28, "No space left on device", "/out/x"), 1, "/out/x: No space left on device"),
        (ZeroDivisionError("division"), 1, "division"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. More"), 1, "lower --num_workers"),
    ):

        def main(args, error=error):
            raise error

        monkeypatch.setattr("sys.argv", ["main.py"])
        with pytest.raises(SystemExit) as stop:
            entry_point.run(main, main_pretrain.get_args_parser())
        assert stop.value.code == code
        assert message in capsys.readouterr().err


def test_remedies_name_only_flags_of_the_script(monkeypatch, capsys):
    def main(args):
        raise advised(ValueError("no"), "--finetune A starts from it", "--init_from A starts from it", "give another")

    for script, message in (
        (main_pretrain, "no: --init_from A starts from it; or give another"),
        (main_finetune, "no: --finetune A starts from it; or give another"),
        (export, "no: give another"),
    ):
        argv = ["--model", "a", "--to", "timm", "--out", "b"] if script is export else []
        monkeypatch.setattr("sys.argv", ["main.py", *argv])
        with pytest.raises(SystemExit):
            entry_point.run(main, script.get_args_parser())
        assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_a_program_error_keeps_its_traceback(monkeypatch):
    def main(args):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("sys.argv", ["main.py"])
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        entry_point.run(main, main_pretrain.get_args_parser())
