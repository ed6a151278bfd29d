"""Pre-training for a fixed time on two CPU cores: which methods help. LEADERBOARD.md has the rules and the table.

    python demo/unpack_data.py
    python benchmarks/leaderboard.py baseline muon                     # five minutes of pre-training each
    python benchmarks/leaderboard.py baseline muon --seeds 0 1 2       # alternating, as a comparison needs
    python benchmarks/leaderboard.py muon --images letters --test      # other images; evaluated on test images, too
    python benchmarks/leaderboard.py baseline muon --epochs 40         # equal updates, whatever they cost

An entry is pre-trained for the number of epochs that fit into the minutes, at the median speed of five epochs, or for
--epochs. Such rows are in tables of their own.
scoring.py evaluates it. The entry "raw pixels" has no encoder. Each entry appends a row to leaderboard.jsonl, and
writes the table and the board of the recipes. The command says whether the score agrees with the earlier rows of the
same entry and machine. records.py compares two entries.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from scipy import stats

import main_pretrain
from benchmarks import machine, scoring, scripts
from benchmarks.fashion_mnist import unpack
from benchmarks.image_sets import SIDE, images_of
from benchmarks.model_table import pretraining_macs
from mae.cli import entry_point
from mae.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from mae.evaluate.tables import markdown
from mae.files import atomic, results
from mae.settings.arguments import arguments
from mae.settings.types import positive, positive_int
from mae.training import log
from mae.training.environment import commit

ROWS, PAGE = (Path(__file__).with_name(name) for name in ("leaderboard.jsonl", "LEADERBOARD.md"))
BOARD = scripts.ROOT / "mae/recommend/board.json"
SAME = ("entry", "budget", "images", "kind", "evaluated on", "machine")  # of rows that are repetitions
PROCESSES = 2  # of one thread each
BASE = {**scripts.PRETRAIN, "patch_size": 4, "batch_size": 32, "cache_images": True, "num_workers": 0, "vis_every": 0}
DEMO: dict[str, Any] = {"patch_size": 7, "batch_size": 64, "lr": 2e-3, "crop": "none"}
NORMALIZED: dict[str, Any] = {**DEMO, "norm_pix_loss": True}
MUON = {"optimizer": "muon"}
CROSS = {"model_class": "examples.cross_decoder:CrossDecoder"}
COMPLEMENTARY = {"model_class": "examples.complementary_masks:ComplementaryMasks"}
FUSED = {"model_class": "examples.fused_blocks:FusedBlocks"}
PIXELS = "raw pixels"
RECIPE = "demo with normalized pixels, muon, uniformity .1"  # the settings of python -m mae.data --recipe
ENTRIES: dict[str, dict[str, Any]] = {
    PIXELS: {},
    "baseline": {},
    "demo": DEMO,
    "demo with patches of 4": {**DEMO, "patch_size": 4},
    "demo with muon": {**DEMO, **MUON},
    "demo with normalized pixels": NORMALIZED,
    "demo with normalized pixels, muon": {**NORMALIZED, **MUON},
    "demo with normalized pixels, uniformity .1": {**NORMALIZED, "uniformity": 0.1},
    "demo with normalized pixels, muon, uniformity .03": {**NORMALIZED, **MUON, "uniformity": 0.03},
    RECIPE: {**NORMALIZED, **MUON, "uniformity": 0.1},
    f"{RECIPE}, cross .25": {**NORMALIZED, **MUON, "uniformity": 0.1, **CROSS, "model_args": ["predicted=0.25"]},
    f"{RECIPE}, cross .75": {**NORMALIZED, **MUON, "uniformity": 0.1, **CROSS, "model_args": ["predicted=0.75"]},
    f"{RECIPE}, fused blocks": {**NORMALIZED, **MUON, "uniformity": 0.1, **FUSED},
    f"{RECIPE}, fused blocks, hidden .5": {
        **NORMALIZED,
        **MUON,
        "uniformity": 0.1,
        **FUSED,
        "model_args": ["hidden=0.5"],
    },
    "demo with normalized pixels, complementary masks": {**NORMALIZED, **COMPLEMENTARY, "batch_size": 32},
    "demo with normalized pixels, complementary masks without consistency": {
        **NORMALIZED,
        **COMPLEMENTARY,
        "batch_size": 32,
        "model_args": ["consistency=0"],
    },
    "demo with normalized pixels, weight decay .2": {**NORMALIZED, "weight_decay": 0.2},
    "demo with random projection": {**DEMO, "model_class": "examples.random_projection:RandomProjection"},
    "128 images per update": {"batch_size": 64, "lr": 2e-3},
    "decoder of 2 blocks": {"decoder_depth": 2},
    "decoder of 128 channels": {"model_class": "examples.wide_decoder:WideDecoder", "model_args": ["width=128"]},
    "mask blocks, 4 class tokens": {"patch_size": 2, "mask_block": 2, "num_cls_tokens": 4},
    "green masks": {"model_class": "examples.colored_masks:ColoredMasks", "model_args": ["color=green"]},
    "blue masks": {"model_class": "examples.colored_masks:ColoredMasks", "model_args": ["color=blue"]},
    "red masks": {"model_class": "examples.colored_masks:ColoredMasks", "model_args": ["color=red"]},
    "muon": MUON,
    "muon, 128 images per update": {**MUON, "batch_size": 64, "lr": 2e-3},
    "rotary": {"encoder": "dinov3", "encoder_args": ["swiglu=true"], "num_cls_tokens": 5},
    "normalized pixels": {"norm_pix_loss": True},
    "random projection": {"model_class": "examples.random_projection:RandomProjection"},
    "two crops": {"model_class": "examples.two_crops:TwoCrops", "repeated_sampling": 2},
    "stable decay": {"lr_schedule": "examples.stable_decay:stable_decay"},
    "averaged weights": {"script": "examples/averaged_weights.py", "weights": "average.pth"},
}
TESTS = ("test", scoring.TEST)  # of --test
UNLABELLED = ("test_loss", "test_effective_rank", "test_uniformity")  # of the last epoch
MEANS = {
    "500 labels": ".2f", "k-NN": ".2f", "linear": ".2f", "minutes": ".2f", "epochs": ".0f", "updates": ",.0f",
    "TMACs": ".1f", "images/s": ",.0f",
}  # fmt: skip
TOLERANCE = 0.1  # of the minutes; a run that exceeds it is repeated once
REPEATED = 30  # minutes; longer runs are not repeated
FASHION_MNIST = "fashion_mnist"
SMALL: dict[str, Any] = {"input_size": 28, "in_chans": 1}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # of images: their name in the table, and their flags
    FASHION_MNIST: ("images of Fashion-MNIST", SMALL),
    "photographs": (
        "squares of photographs",
        {"input_size": SIDE, "patch_size": 12, "in_chans": 3, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    ),
    "letters": ("letters", {**SMALL, "mean": [0.081], "std": [0.249], "hflip": 0}),  # a mirrored b is a d
}


def pretrain(flags: dict[str, Any], out: Path, epochs: int) -> list[dict[str, Any]]:
    """Trains in two processes; returns the lines of log.txt."""
    run_flags = {"epochs": epochs, "warmup_epochs": epochs / 20, "save_every": epochs, "output_dir": out}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", PROCESSES]
    scripts.run_python(*launcher, *command({**flags, **run_flags}), threads=1)
    return log.read(out)


def pretrain_probed(flags: dict[str, Any], out: Path, epochs: int) -> list[dict[str, Any]]:
    """Trains with a probe after the last epoch; returns the lines of log.txt."""
    return pretrain({**flags, "probe_every": epochs, "probe_path": flags["data_path"]}, out, epochs)


def pretrain_for(minutes: float, flags: dict[str, Any], folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Trains for the number of epochs that fit into the minutes; returns the run directory and the lines of log.txt."""
    _, *lines = pretrain(flags, folder / "speed", 6)  # the first epoch is slower
    for out in (folder / "run", folder / "run_again"):
        epochs = max(2, round(60 * minutes / statistics.median(line["seconds"] for line in lines)))
        lines = pretrain_probed(flags, out, epochs)
        if abs(minutes_of(lines) / minutes - 1) < TOLERANCE or minutes > REPEATED:
            break
    return out, lines


def minutes_of(lines: list[dict[str, Any]]) -> float:
    """Returns the time of a run, from the median of its epochs."""
    return len(lines) * statistics.median(line["seconds"] for line in lines) / 60


def command(flags: dict[str, Any]) -> list[str]:
    """Returns the script that pre-trains an entry, and its flags."""
    others = {name: value for name, value in flags.items() if name not in ("script", "weights")}
    return [flags.get("script", "main_pretrain.py"), *map(str, arguments(others))]


def rows_of(name: str, seed: int, args: argparse.Namespace, version: str | None) -> list[dict[str, Any]]:
    """Pre-trains and evaluates an entry; returns its rows. `version`: the commit."""
    kind, image_flags = KINDS[args.images]
    method = {**BASE, **ENTRIES[name], **image_flags}
    data = args.data_path or (scripts.DATA if args.images == FASHION_MNIST else images_of(args.images))
    flags = {**method, "data_path": data, "seed": seed}
    images = sum(1 for _ in (scripts.ROOT / data / "train").glob("*/*"))
    with tempfile.TemporaryDirectory() as folder:
        file = None
        measured = {}
        if name != PIXELS:
            if args.epochs:
                out = Path(folder) / "run"
                lines = pretrain_probed(flags, out, args.epochs)
            else:
                out, lines = pretrain_for(args.minutes, flags, Path(folder))
            file = out / flags.get("weights", f"checkpoint-{len(lines) - 1}.pth")
            measured = measures(flags, lines, images)
        sets = sets_of(data, Path(folder))
        if not args.test:
            sets = {evaluated: lists for evaluated, lists in sets.items() if evaluated not in TESTS}
        accuracies = {
            evaluated: scoring.of_encoder(file, {**flags, **lists}, seed, Path(folder) / evaluated)
            if file
            else scoring.of_pixels({**flags, **lists}, seed)
            for evaluated, lists in sets.items()
        }
        counts = {evaluated: scoring.count(lists["val_list"]) for evaluated, lists in sets.items() if lists}
    budget = f"{args.epochs} epochs" if args.epochs else args.minutes
    entry = {"entry": name, "seed": seed, "budget": budget, "images": images, "kind": kind}
    shared = {"machine": machine.processor(), "commit": version, "date": date.today().isoformat()}
    return [
        {
            **entry, "evaluated on": evaluated, **found,
            "score": round(statistics.fmean(found[name] for name in scoring.SCORED), 2),
            **({"evaluated images": counts[evaluated]} if evaluated in counts else {}),
            **measured, **shared,
            **({"command": " ".join(command(method))} if measured else {}),
        }
        for evaluated, found in accuracies.items()
    ]  # fmt: skip


def sets_of(data: Path, folder: Path) -> dict[str, dict[str, Path]]:
    """Returns the flags that read the images of each evaluation; lists are written to a folder.

    The embedded images have 10,000 test images, and as many other training images, of Debian's package.
    """
    if data != scripts.DATA:
        return {"held-out": scoring.hold_out(data, folder), "test": {}}
    every = unpack.OUT / "images"
    if not every.exists():
        raise FileNotFoundError(
            f"{every}: run apt-get install dataset-fashion-mnist, and python benchmarks/fashion_mnist/unpack.py"
        )
    return scoring.other_images(data, every, folder)


def measures(flags: dict[str, Any], lines: list[dict[str, Any]], images: int) -> dict[str, Any]:
    """Returns what a pre-training on a number of images cost, and what it measured without labels."""
    batch = PROCESSES * flags["batch_size"]
    updates = len(lines) * (images * flags.get("repeated_sampling", 1) // batch)
    settings = entry_point.parse(main_pretrain.get_args_parser(), command(flags)[1:])
    return {
        **{measure: float(f"{lines[-1][measure]:.5g}") for measure in UNLABELLED},
        "minutes": round(minutes_of(lines), 2), "epochs": len(lines), "updates": updates,
        "TMACs": round(updates * batch * pretraining_macs(settings) / 1e12, 1),
        "images/s": round(statistics.median(line["images_per_s"] for line in lines)),
    }  # fmt: skip


def read() -> list[dict[str, Any]]:
    """Returns all rows."""
    return results.read_lines(ROWS)


def budget_of(row: dict[str, Any]) -> str:
    """Returns the budget of a row: minutes, or epochs that were given."""
    budget = row["budget"]
    return budget if isinstance(budget, str) else f"{budget:g} minutes"


def described(kind: str) -> str:
    """Returns a kind of images, with the flag that its rows have besides those of the entry."""
    flags = dict(KINDS.values()).get(kind, {})
    return f"{kind}, with --hflip 0" if flags.get("hflip") == 0 else kind


def board_of(rows: list[dict[str, Any]]) -> str:
    """Returns the mean score of each kind and time, for `mae.recommend.board`: on test images, if there is one.

    It is that of RECIPE, or of the best entry if RECIPE has no rows; the best of the machines.
    """
    scores: dict[tuple[str, int, float], dict[str, dict[tuple[str, str], list[float]]]] = {}
    for row in rows:
        if isinstance(row["budget"], str):  # epochs
            continue
        kinds = scores.setdefault((row["kind"], row["images"], row["budget"]), {})
        entries = kinds.setdefault(row["evaluated on"], {})
        entries.setdefault((row["machine"], row["entry"]), []).append(row["score"])
    flags_of = dict(KINDS.values())
    found = []
    for (kind, images, minutes), sets in scores.items():
        chosen = next(sets[name] for name in (*TESTS, scoring.OTHERS, "held-out") if name in sets)
        means = {key: statistics.fmean(found) for key, found in chosen.items()}
        pixels = [means.pop(key) for key in list(means) if key[1] == PIXELS]
        if pixels and means:
            of_recipe = {key: score for key, score in means.items() if key[1] == RECIPE}
            (_, entry), score = max((of_recipe or means).items(), key=lambda pair: pair[1])
            name = {"entry": "a recipe" if of_recipe else entry}
            best = {**name, "score": round(score, 2), "pixels": round(pixels[0], 2)}
            shape = {"channels": flags_of[kind]["in_chans"], "side": flags_of[kind]["input_size"]}
            found.append({"images": images, "kind": described(kind), **shape, "minutes": minutes, **best})
    return f"{json.dumps(found, indent=2)}\n"


def table() -> str:
    """Returns a table for each budget, with a row for each entry: the means over its seeds, the best first."""
    tables: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for row in read():
        title = f"{budget_of(row)}, {row['images']:,} {row['kind']}, evaluated on {row['evaluated on']} images:"
        tables.setdefault(title, {}).setdefault((row["machine"], row["entry"]), []).append(row)
    titles = ["entry", "seeds", "score", "standard error", *MEANS, "machine", "commit", "date"]
    parts = []
    for title, entries in tables.items():
        ranked = sorted(entries, key=lambda key: (key[0], -statistics.fmean(row["score"] for row in entries[key])))
        parts += [title, markdown(titles, [summary(entries[key]) for key in ranked])]
    return "\n\n".join(parts)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the cells of an entry, with the standard deviation of its scores over the seeds, and the standard error
    of a score that the number of images leaves.
    """
    scores = [row["score"] for row in rows]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    means = []
    for name, form in MEANS.items():
        values = [row[name] for row in rows if name in row]  # the first rows have no linear probe
        means.append(f"{statistics.fmean(values):{form}}" if values else "")
    seeds = " ".join(map(str, sorted(row["seed"] for row in rows)))
    last = [rows[-1][name] for name in ("machine", "commit", "date")]
    images = rows[0].get("evaluated images")  # earlier rows lack it
    accuracies = [statistics.fmean(row[name] for row in rows) for name in scoring.SCORED]
    error = f"{scoring.standard_error(accuracies, images):.2f}" if images else ""
    return [rows[0]["entry"], seeds, f"{statistics.fmean(scores):.2f}{spread}", error, *means, *last]


def prediction_interval(scores: list[float]) -> tuple[float, float]:
    """Returns the bounds that the score of one more run has with a probability of 95 % (Student's t)."""
    scale = statistics.stdev(scores) * math.sqrt(1 + 1 / len(scores))
    return stats.t.interval(0.95, len(scores) - 1, statistics.fmean(scores), scale)


def agreement(row: dict[str, Any], earlier: list[dict[str, Any]]) -> str:
    """Compares the score of a row with the earlier rows of the same entry, budget and machine."""
    scores = [other["score"] for other in earlier if all(other[name] == row[name] for name in SAME)]
    found = f"{row['entry']}, {row['evaluated on']} images, {row['machine']}: {row['score']:.2f}"
    if len(scores) < 2:
        return f"{found}, {len(scores)} earlier rows"
    low, high = prediction_interval(scores)
    interval = f"the 95 % prediction interval of {len(scores)} earlier rows, {low:.2f} to {high:.2f}"
    return f"{found}, {'within' if low <= row['score'] <= high else 'OUTSIDE'} {interval}"


def write_table(command: str, text: str, path: Path) -> None:
    """Replaces the table of a command in a page."""
    page = path.read_text()
    marker = f"<!-- {command} -->\n"
    start = page.index(marker) + len(marker)
    atomic.write_text(path, f"{page[:start]}{text}\n{page[page.index('<!-- end -->', start) :]}")


def main(args: argparse.Namespace) -> None:
    """Runs entries, appends their rows, and compares them with earlier rows."""
    version = commit()  # before the first row changes a file
    for seed, name in itertools.product(args.seeds, args.entries):
        earlier = read()
        rows = rows_of(name, seed, args, version)
        for row in rows:
            results.add_line(ROWS, json.dumps(row))
        write_table("python benchmarks/leaderboard.py", table(), PAGE)
        atomic.write_text(BOARD, board_of(read()))
        print(*map(json.dumps, rows), *(agreement(row, earlier) for row in rows), sep="\n", flush=True)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Pre-trains entries of the leaderboard for a fixed time, and evaluates them.")
    parser.add_argument("entries", nargs="+", choices=ENTRIES, metavar="ENTRY", help=", ".join(ENTRIES))
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", default=5.0, type=positive, metavar="M", help="wall time of the pre-training")
    budget.add_argument("--epochs", type=positive_int, metavar="N", help="epochs of the pre-training: equal updates")
    parser.add_argument("--seeds", nargs="+", default=[0], type=int, metavar="S", help="of pre-training and draws; the "
                        "entries alternate")  # fmt: skip
    parser.add_argument("--test", action="store_true", help="evaluate on the test images too, once per entry")
    parser.add_argument("--images", choices=KINDS, default=FASHION_MNIST, help="letters need benchmarks/letters.py")
    parser.add_argument("--data_path", type=Path, metavar="DIR", help="images of this kind (default: those of the "
                        "repository, or written to runs/small_data)")  # fmt: skip
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
