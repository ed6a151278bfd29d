"""The speedrun: five minutes of pre-training in one file that anyone may edit. SPEEDRUN.md has the rules.

    python benchmarks/fashion_mnist/unpack.py
    python benchmarks/speedrun.py benchmarks/speedruns/mine.py --seconds 20 --held_out        # a rehearsal: no row
    python benchmarks/speedrun.py benchmarks/speedruns/{mine,baseline}.py --seeds 0 1 2       # a claim, in turns
    python benchmarks/speedrun.py --check 1a2b3c4d                                            # a claim of others

A run trains an entry in a process, which has the training images only, for --seconds on one thread. Two other processes
compute features of the images, without labels and in random order. This process measures the time, and the accuracy of
a linear probe. A run that breaks a rule has no row. Any other run of five minutes appends its row to speedrun.jsonl and
writes the table. With two files, the command tests whether the first is better than the second.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import leaderboard, machine, records, sandbox, scripts
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.files import results
from mae.settings.types import positive
from mae.training.environment import commit

ROWS, PAGE = (Path(__file__).with_name(name) for name in ("speedrun.jsonl", "SPEEDRUN.md"))
ENTRIES = scripts.ROOT / "benchmarks/speedruns"
RECORDS = ENTRIES / "records.txt"  # names of files in ENTRIES, each above the one before it
DATA = scripts.ROOT / "runs/study/data"
HELD_OUT = 10_000  # of the 60,000 training images
SECONDS = 300.0
GRACE = 3.0  # seconds more, to write the encoder
ENCODING = 600.0  # seconds, for all images
LONGEST = 20_000  # bytes of a file: no room for weights or labels
# Largest motions of an image: radians, a share of the size, and shares of half of the side, to the right and down.
MOTION = (math.radians(15), 0.2, 8 / 28, 8 / 28)
WIDEST = 128  # features: with more, those of untrained encoders classify nearly as well
BUSY = 1.1  # seconds of the CPU in a second: more than one thread
BATCH_SIZE = 500  # images that an encoder gets at a time
AGAIN = 500  # images whose features are computed twice
FEW = 10  # images at a time for the second time: what depends on the others differs most with few of them
TOLERANCE = 0.01  # of their difference, in standard deviations of a feature
REFUSED = "refused, no row"

Row = dict[str, Any]


def digest(*files: Path) -> str:
    """Returns the SHA-256 of files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def read_images(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the moved training or test images (N, 28, 28), uint8, and their labels (N,)."""
    from torchvision.datasets import FashionMNIST  # takes more than a second

    try:
        dataset = FashionMNIST(DATA, train=train)
    except RuntimeError as error:
        raise ValueError(f"{DATA} has no images: run python benchmarks/fashion_mnist/unpack.py") from error
    return moved(dataset.data.numpy(), int(train)), dataset.targets.numpy()


def moved(images: np.ndarray, seed: int) -> np.ndarray:
    """Moves each image (N, 28, 28), uint8, by chance: shift, rotation and scale. What moves out of it is lost.

    Raw pixels of centered garments classify as well as the features of a short pre-training. Those of moved ones don't.
    """
    draw = torch.Generator().manual_seed(seed)
    angles, scales, *shifts = (2 * torch.rand(4, len(images), generator=draw) - 1) * torch.tensor(MOTION)[:, None]
    cosines, sines = (function(angles) / (1 + scales) for function in (torch.cos, torch.sin))
    rows = [torch.stack([cosines, -sines, shifts[0]], dim=1), torch.stack([sines, cosines, shifts[1]], dim=1)]
    parts = []
    for part, motion in zip(
        torch.from_numpy(images)[:, None].split(1000), torch.stack(rows, dim=1).split(1000), strict=True
    ):
        grid = F.affine_grid(motion, list(part.shape), align_corners=False)
        parts.append(F.grid_sample(part.float(), grid, align_corners=False)[:, 0].round().clamp(0, 255).byte())
    return torch.cat(parts).numpy()


def start(task: str, file: Path, folder: Path, *values: object, limit: float) -> float:
    """Runs a task of sandbox.py in a process; returns its seconds.

    Args:
        limit: seconds after which the process is killed.

    Raises:
        ValueError: it was killed, has failed, or has used more than one core.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
    environment = {**environment, "TMPDIR": str(folder), "PYTHONPATH": ""}
    command = [sys.executable, sandbox.__file__, task, *map(str, (file.resolve(), folder, *values))]
    used = _cpu_seconds()
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment) as process:
        assert process.stdout
        process.stdout.readline()  # "ready"
        ready = time.perf_counter()
        timer = threading.Timer(limit, process.kill)
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
        status = process.wait()
        timer.cancel()
    ended = time.perf_counter()
    if ended - ready >= limit:
        raise ValueError(f"{file}: {REFUSED}: `{task}` has not ended after {limit:g} seconds")
    if status:
        raise ValueError(f"{file}: {REFUSED}: `{task}` has failed with exit status {status}")
    if (busy := (_cpu_seconds() - used) / (ended - started)) > BUSY:
        raise ValueError(f"{file}: {REFUSED}: `{task}` has used {busy:.1f} cores; it may use one thread")
    return ended - ready


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def pretrain(file: Path, images: np.ndarray, seconds: float, seed: int, encoder: Path) -> float:
    """Trains an entry on images, and writes its encoder; returns the seconds that it took.

    Raises:
        ValueError: as `start`, or the file is too long.
    """
    if (size := file.stat().st_size) > LONGEST:
        raise ValueError(f"{file}: {REFUSED}: it has {size:,} bytes; at most {LONGEST:,}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / sandbox.IMAGES, images)
        taken = start("train", file, folder, seconds, seed, limit=seconds + GRACE)
        shutil.copy(folder / sandbox.ENCODER, encoder)
    return taken


def encode(file: Path, encoder: Path, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the features (N, D) of images, which a process without anything else computes in batches.

    Raises:
        ValueError: as `start`, or the features break a rule.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / sandbox.IMAGES, images)
        shutil.copy(encoder, folder / sandbox.ENCODER)
        start("encode", file, folder, batch_size, limit=ENCODING)
        features = np.load(folder / sandbox.FEATURES)
    if features.ndim != 2 or len(features) != len(images) or features.shape[1] > WIDEST:
        shape = f"({len(images)}, D), D at most {WIDEST}"
        raise ValueError(f"{file}: {REFUSED}: the features have the shape {features.shape} instead of {shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"{file}: {REFUSED}: features are not finite")
    if (features == features[0]).all():
        raise ValueError(f"{file}: {REFUSED}: all images have the same features")
    return features


def encode_twice(file: Path, encoder: Path, images: np.ndarray) -> np.ndarray:
    """Returns the features of images, after a check that they depend on one image only, and not on chance.

    Both processes get the images in random order, so that neither can know which are test images.

    Raises:
        ValueError: as `encode`, or the features of an image differ between the processes.
    """
    draw = np.random.default_rng()  # without a seed: nobody knows the order
    order = draw.permutation(len(images))
    features = encode(file, encoder, images[order], BATCH_SIZE)
    again = draw.permutation(len(images))[:AGAIN]
    difference = encode(file, encoder, images[order[again]], FEW) - features[again]
    differences = np.sqrt(np.square(difference).mean(axis=0))
    deviations = features.std(axis=0)
    worst = np.argmax(differences - TOLERANCE * deviations)
    if differences[worst] > TOLERANCE * deviations[worst]:
        raise ValueError(
            f"{file}: {REFUSED}: feature {worst} of an image depends on the images beside it, on chance, or on "
            f"rounding: it differs by {differences[worst]:.2g}, with a standard deviation of {deviations[worst]:.2g}; "
            f"compute features of each image by itself, in fp32"
        )
    return features[np.argsort(order)]


def accuracy(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> float:
    """Returns the accuracy of a linear probe of features in percent.

    It is ridge regression to the classes on standardized features: exact, without a learning rate.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), RidgeClassifier()).fit(bank.astype(float), labels)
    return 100 * float(probe.score(queries.astype(float), truth))


def run_entry(file: Path, seed: int, seconds: float, held_out: bool) -> Row:
    """Trains an entry and evaluates it; returns what was measured.

    Raises:
        ValueError: the run breaks a rule.
    """
    images, labels = read_images(train=True)
    queries, truth = (images[-HELD_OUT:], labels[-HELD_OUT:]) if held_out else read_images(train=False)
    bank = images[:-HELD_OUT] if held_out else images
    with tempfile.TemporaryDirectory() as folder:
        encoder = Path(folder, sandbox.ENCODER)
        taken = pretrain(file, bank, seconds, seed, encoder)
        print(f"{file.stem}: trained for {taken:.1f} seconds; evaluating, about a minute", flush=True)
        features = encode_twice(file, encoder, np.concatenate([bank, queries]))
    score = accuracy(features[: len(bank)], labels[: len(bank)], features[len(bank) :], truth)
    error = math.sqrt(score * (100 - score) / len(truth))
    return {
        "entry": file.stem, "sha256": digest(file), "seed": seed, "score": round(score, 2),
        "error": round(error, 2), "seconds": round(taken, 1), "features": features.shape[1],
    }  # fmt: skip


def read() -> list[Row]:
    """Returns all rows."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table() -> str:
    """Returns a line for each entry and machine: means over the seeds, and the test against the record before."""
    rows: records.Rows = defaultdict(list)
    for row in read():
        rows[row["sha256"], row["machine"]].append(row)
    names = RECORDS.read_text().split()
    others = sorted(file.stem for file in ENTRIES.glob("*.py") if file.stem not in names)
    digests = {name: digest(ENTRIES / f"{name}.py") for name in [*names, *others]}
    before = {later: digests[name] for name, later in itertools.pairwise(names)}
    before |= dict.fromkeys(others, digests[names[-1]])
    lines = []
    for name, found in digests.items():
        for key in [key for key in rows if key[0] == found]:
            earlier = before.get(name)
            tested = records.tests(found, earlier, rows).get(key[1]) if earlier else None
            gain = "{:+.2f} ({:.2f} to {:.2f})".format(*tested[:3]) if tested else ""
            p = f"{tested[3]:.1g}" if tested else ""
            seeds = " ".join(str(row["seed"]) for row in rows[key])
            last = [rows[key][-1][title] for title in ("machine", "commit", "date")]
            linked = f"[{name}](speedruns/{name}.py) {found[:8]}{'' if name in names else ', no record'}"
            lines.append([linked, summary([row["score"] for row in rows[key]]), seeds, gain, p, *last])
    titles = ["entry", "score", "seeds", "gain (95 %)", "p", "machine", "commit", "date"]
    return markdown(titles, lines) if lines else "No entry has been run for five minutes yet."


def summary(scores: list[float]) -> str:
    """Returns the mean of scores, with its standard error over the seeds."""
    mean = f"{statistics.fmean(scores):.2f}"
    return f"{mean} ± {statistics.stdev(scores) / math.sqrt(len(scores)):.2f}" if len(scores) > 1 else mean


def claim_of(start_of_digest: str) -> tuple[Path, list[float]]:
    """Returns the file of a claim, and its scores: those of the first rows with this SHA-256, of one machine.

    Raises:
        ValueError: there are no such rows, too few, or no such file.
    """
    rows = [row for row in read() if row["sha256"].startswith(start_of_digest)]
    claimed = [row["score"] for row in rows if all(row[key] == rows[0][key] for key in ("sha256", "machine", "commit"))]
    if len(claimed) < records.FEWEST:
        raise ValueError(f"check={start_of_digest}: {len(claimed)} rows of {ROWS.name}; a claim has {records.FEWEST}")
    if rows[0]["harness"] != harness():
        raise ValueError(f"check={start_of_digest}: of another evaluation: check out commit {rows[0]['commit']}")
    files = [file for file in sorted(ENTRIES.glob("*.py")) if digest(file) == rows[0]["sha256"]]
    if not files:
        raise ValueError(f"check={start_of_digest}: no file of {ENTRIES} has this SHA-256: add the file of the claim")
    return files[0], claimed


@functools.cache
def harness() -> str:
    """Returns the first digits of the SHA-256 of what measures an entry."""
    return digest(Path(__file__), Path(sandbox.__file__))[:12]


def verdict(better: Path, worse: Path, scores: dict[Path, list[float]]) -> str:
    """Returns the test of two entries that were run in turns."""
    difference, low, high, p = records.compare(scores[better], scores[worse])
    found = "better" if p < records.LEVEL else f"not better, which needs p < {records.LEVEL:g}"
    return f"{better.stem} - {worse.stem}: {difference:+.2f} ({low:.2f} to {high:.2f}), p = {p:.2g}: {found}"


def main(args: argparse.Namespace) -> None:
    """Runs entries in turns, and appends their rows; or checks a claim.

    Raises:
        ValueError: a run breaks a rule, or the scores are not those of the claim.
    """
    if (len(args.files) in (1, 2)) == bool(args.check):
        raise ValueError("give one or two files, or `check`")
    if missing := [str(file) for file in args.files if not file.is_file()]:
        raise ValueError(f"there is no file {missing[0]}")
    torch.set_num_threads(1)
    version = commit()  # before the first row changes a file
    claimed: list[float] = []
    files = args.files
    if args.check:
        file, claimed = claim_of(args.check)
        standing = ENTRIES / f"{RECORDS.read_text().split()[-1]}.py"
        files = [file] if digest(file) == digest(standing) else [file, standing]
    shared = {"machine": machine.processor(), "torch": torch.__version__, "commit": version, "harness": harness()}
    scores: dict[Path, list[float]] = {file: [] for file in files}
    errors = {}  # of the last seed
    for seed, file in itertools.product(args.seeds, files):
        row = {**run_entry(file, seed, args.seconds, args.held_out), **shared, "date": date.today().isoformat()}
        scores[file].append(row["score"])
        errors[file] = row["error"]
        if args.seconds != SECONDS or args.held_out:
            print(f"{file.stem}, seed {seed}: {row['score']:.2f}, a rehearsal without a row", flush=True)
        else:
            print(json.dumps(row), flush=True)
            results.add_line(ROWS, json.dumps(row))
            leaderboard.write_table("python benchmarks/speedrun.py", table(), PAGE)
    for file, found in scores.items():
        print(f"{file.stem}: {summary(found)} over the seeds; ± {errors[file]} over the evaluated images")
    if len(scores) > 1:
        enough = len(args.seeds) >= records.FEWEST
        print(verdict(files[0], files[1], scores) if enough else f"no test: it needs {records.FEWEST} seeds")
    if claimed:
        difference, low, high, _ = records.compare(scores[files[0]], claimed)
        compared = f"{difference:+.2f} ({low:.2f} to {high:.2f}) from the claim of {statistics.fmean(claimed):.2f}"
        if not low <= 0 <= high:
            raise ValueError(f"check={args.check}: DISAGREES: {compared}")
        print(f"agrees: {compared}")


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Trains entries of the speedrun and evaluates them, or checks a claim.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="an entry, or two in turns")
    parser.add_argument("--check", metavar="SHA256", help="run the file of a claim in turns with the last record, and "
                        "compare: first digits of its SHA-256 in speedrun.jsonl")  # fmt: skip
    parser.add_argument("--seconds", default=SECONDS, type=positive, metavar="S", help="of training; other values than "
                        "the default write no row")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", default=[0, 1, 2], type=int, metavar="N", help="the entries alternate")
    parser.add_argument("--held_out", action="store_true", help=f"train without the last {HELD_OUT:,} training images, "
                        "and evaluate on them instead of the test images: for choices; no row")  # fmt: skip
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
