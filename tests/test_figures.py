"""Numbers in the documents: published ones equal those of the papers, measured ones those of the result files."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import models_mae
import models_vit
from benchmarks import gpu_table
from demo.unpack_data import ARCHIVE
from mae.weights import model_zoo

# ViT-B/16, ViT-L/16, ViT-H/14 and ViT-H/14 at 448 pixels, as published.
RESULTS = {
    "ImageNet-1K": "83.6 85.9 86.9 87.8", "ImageNet-1K, linear probe": "67.8 76.0 77.2",
    "ImageNet-C, mCE": "51.7 41.8 33.8 36.8", "ImageNet-A": "35.9 57.1 68.2 76.7", "ImageNet-R": "48.3 59.9 64.4 66.5",
    "ImageNet-Sketch": "34.5 45.3 49.6 50.9", "iNaturalist 2017": "70.5 75.7 79.3 83.4",
    "iNaturalist 2018": "75.4 80.1 83.0 86.8", "iNaturalist 2019": "80.5 83.4 85.7 88.3",
    "Places205": "63.9 65.8 65.9 66.8", "Places365": "57.9 59.4 59.8 60.3",
}  # fmt: skip


def text(document):
    return (ROOT / document).read_text(encoding="utf-8")


def row(document, name):
    """The cells of a table's row after its name."""
    (line,) = [line for line in text(document).splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


@pytest.mark.parametrize("name", RESULTS)
def test_the_papers_table(name):
    start = f"{name} | {RESULTS[name].split()[0]}"  # another table names the same data sets
    assert " ".join(row("docs/results.md", start)[:4]).strip() == RESULTS[name]


def test_the_published_recipes():
    for document, name, cells in (
        ("FINETUNE.md", "published top-1 | 83", ["83.66", "85.95", "86.93", "87.8 (paper)"]),
        ("FINETUNE.md", "published top-1 | 67", ["67.8", "76.0", "77.2"]),
        ("FINETUNE.md", "hardware and time", ["32 V100, 7 h 11 min", "32 V100, 8 h 52 min", "64 V100, 13 h 09 min"]),
        ("PRETRAIN.md", "published top-1", ["83.6 / 67.8", "85.9 / 76.0", "86.9 / 77.2"]),
        # ViT-S of a third party, ViT-B and ViT-L.
        ("docs/results.md", "nearest neighbors |", ["18.0", "35.6", "48.1"]),
        ("docs/results.md", "linear probe |", ["47.1", "67.8", "76.0"]),
        ("docs/results.md", "attentive probe |", ["64.6", "75.5", "79.5"]),
    ):
        assert row(document, name)[: len(cells)] == cells
    for name, epochs in (("fine-tuning (", (100, 50, 50)), ("linear probing (", (90, 50, 50))):
        cells = row("FINETUNE.md", name)[:3]
        assert [cell.split(", ")[-1] for cell in cells] == [f"{number} epochs" for number in epochs]
    mmpretrain = row("FINETUNE.md", "mmpretrain's settings")[:3]
    assert [cell.split(": ")[-1] for cell in mmpretrain] == ["83.5", "85.7", "86.9"]


@pytest.mark.parametrize(("recipe", "numbers"), [
    ("finetune_vit_base", "83.66 83.63 83.52 83.46"), ("finetune_vit_large", "85.95 85.87 85.76 85.88"),
    ("finetune_vit_huge", "86.93"), ("finetune_vit_base_mmpretrain", "83.1 83.3 83.5 82.93"),
    ("finetune_vit_large_mmpretrain", "85.2 85.4 85.7"), ("finetune_vit_huge_mmpretrain", "86.9"),
    ("linprobe_vit_base", "67.8 68.0 60.8 62.5 65.1 67.1"), ("linprobe_vit_large", "76.0 75.8 70.7 73.7 75.5"),
    ("linprobe_vit_huge", "77.2 76.6"), ("linprobe_attentive_vit_base", "75.5 35.6 67.8 64.6 18.0 47.1"),
    ("linprobe_attentive_vit_large", "79.5 48.1 76.0"),
    *((name, RESULTS[title]) for name, title in (
        ("finetune_inat2017", "iNaturalist 2017"), ("finetune_inat2018", "iNaturalist 2018"),
        ("finetune_inat2019", "iNaturalist 2019"), ("finetune_places205", "Places205"),
        ("finetune_places365", "Places365"))),
])  # fmt: skip
def test_the_header_of_a_recipe_has_the_published_accuracies(recipe, numbers):
    header = text(f"recipes/{recipe}.yaml").partition("\nmodel:")[0]
    assert set(numbers.split()) <= set(re.findall(r"\d+\.\d+", header))


LINEAR = {"base": 67.8, "large": 76.0, "huge": 77.2}  # of the paper's released weights


def zoo_row(name):
    """The expected row of a released file in the model zoo."""
    row = model_zoo.TABLE[name]
    size = row.model.removeprefix("mae_").split("_")[1]
    with torch.device("meta"):
        if row.kind == model_zoo.FULL:
            model = getattr(models_mae, row.model)()
        else:
            classes = 1000 if row.kind == model_zoo.CLASSIFIER else 0
            vit = getattr(models_vit, row.model.removeprefix("mae_"))
            model = vit(img_size=row.input_size, num_classes=classes, global_pool=classes > 0)
    linear = None
    if row.kind != model_zoo.CLASSIFIER and row.top1:
        probes = {key: probe.top1 for key, probe in model_zoo.TABLE.items() if "-linear-" in key}
        mine = [top1 for key, top1 in probes.items() if key.startswith(f"vit-{size}-") and f"-{row.epochs}e-" in key]
        linear = LINEAR[size] if row.license.startswith("CC") else (mine or [None])[0]
    return [
        row.kind + (", 448 pixels" if row.input_size == 448 else ""), str(row.epochs or ""),
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M", f"{row.top1:.4g}" if row.top1 else "",
        str(linear or ""), row.license,
    ]  # fmt: skip


def zoo_table(document):
    """The rows of released files in a document: name and cells."""
    lines = [line.strip("|").split(" | ") for line in text(document).splitlines() if re.match(r"\| `\S*", line)]
    table = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in lines}
    return {name: cells for name, cells in table.items() if name in model_zoo.TABLE}


def test_the_model_zoo_has_every_released_file():
    released = {name for name, row in model_zoo.TABLE.items() if row.url}
    assert zoo_table("docs/zoo.md") == {name: zoo_row(name) for name in released}


def test_the_rows_of_the_readme_are_those_of_the_model_zoo():
    table, zoo = zoo_table("README.md"), zoo_table("docs/zoo.md")
    assert len(table) == 4
    assert {name: zoo[name] for name in table} == table


@pytest.mark.parametrize(("machine", "model", "file", "step"), [
    ("AMD EPYC, two cores", "ViT-B, 16", "amd_epyc/pretrain_base_patch16_bf16_cpu", None),
    ("Intel Xeon with AMX, two cores", "ViT-B, 16", "intel_xeon_amx/pretrain_base_patch16_bf16_cpu", None),
    ("NVIDIA H100", "ViT-B, 512", "nvidia_h100/gpu_check", "base"),
    ("NVIDIA H100", "ViT-L, 512", "nvidia_h100/gpu_check", "large"),
    ("NVIDIA H100", "ViT-H, 128", "nvidia_h100/gpu_check", "huge"),
    ("NVIDIA H200", "ViT-B, 512", "nvidia_h200/gpu_check", "base"),
    ("NVIDIA H200", "ViT-L, 512", "nvidia_h200/gpu_check", "large"),
    ("NVIDIA H200", "ViT-H, 128", "nvidia_h200/gpu_check", "huge"),
])  # fmt: skip
def test_the_speed_of_pretraining(machine, model, file, step):
    """Medians, their ranges, and a mark where the rounds differ by more than 5 %."""
    found, batch_size = json.loads(text(f"benchmarks/results/{file}.json")), int(model.split()[1])
    if step:
        cells = [cell for cell in found["steps"][step]["cells"] if cell["batch_size"] == batch_size]
        names = {"eager": "ours eager", "compiled": "ours compiled"}  # of an earlier version
        rounds = {names.get(cell["way"], cell["way"]): cell["all_images_per_second"] for cell in cells}
    else:
        rounds = {way: [batch_size / seconds for seconds in times] for way, times in found["seconds"].items()}
    ways = [way for way in ("transformers eager", "plain eager", "plain compiled", "ours eager", "ours compiled")
            if way in rounds]  # fmt: skip
    expected = []
    for least, median, most in (np.percentile(rounds[way], [0, 50, 100]) for way in ways):
        digits = 0 if median > 100 else 2
        mark = r" \*" if (most - least) / median > 0.05 else ""
        expected.append(f"{median:,.{digits}f} ({least:,.{digits}f}–{most:,.{digits}f}){mark}")
    assert [cell for cell in row("benchmarks/README.md", f"{machine} | {model}")[1:] if cell] == expected


def test_the_table_of_a_gpu_has_the_ranges():
    """The rounds of ViT-L on an H200, compiled with 512 images: 2,634, 2,647 and 3,021."""
    results = json.loads(text("benchmarks/results/nvidia_h200/gpu_check.json"))
    lines = gpu_table.table(results["machine"], results).splitlines()
    (cell,) = [line.split(" | ")[4] for line in lines if "large_patch16 | 512 | ours compiled" in line]
    assert cell == r"2,647 (2,634–3,021) \*"
    (cell,) = [line.split(" | ")[4] for line in lines if "large_patch16 | 512 | plain eager" in line]
    assert cell == "2,218 (2,208–2,242)"


def test_the_speed_of_a_run_with_jpeg_files_on_a_gpu():
    steps = json.loads(text("benchmarks/results/nvidia_h200/gpu_check.json"))["steps"]
    epoch, decoded = steps["whole"]["second_epoch"], steps["loader"]["images_per_second"]["--fast_jpeg, 16 workers"]
    page = text("benchmarks/README.md")
    for figure in (f"{epoch['images_per_s']:,.0f} images/s", f"{decoded:,.0f} images/s", f"{epoch['data_wait']:.0%}"):
        assert figure.replace("%", " %") in page


def test_pretraining_is_above_every_baseline_of_the_study():
    """With every number of labels, fine-tuning from the pre-trained encoder is above scratch and raw pixels."""
    lines = text("benchmarks/fashion_mnist/table.md").splitlines()[2:]
    rows = [[cell.strip(" *") for cell in line.split("|")] for line in lines if "|" in line]
    means = {cells[1]: [float(cell.split(" ")[0]) for cell in cells[2:-1]] for cells in rows}
    best = means["pre-trained (fine-tuned)"]
    for name, others in means.items():
        is_baseline = not name.startswith("pre-trained")
        assert not is_baseline or all(ours > other for ours, other in zip(best, others, strict=True)), name
    assert best[-1] >= 91.5


@pytest.mark.slow
def test_the_strongest_baseline_of_the_demo():
    """An RBF-SVM of scikit-learn on standardized pixels with 10,000 labels, and the defaults of the comparison."""
    archive = np.load(ARCHIVE, allow_pickle=False)
    train, val = (archive[f"{split}_images"].reshape(-1, 28 * 28) / 255 for split in ("train", "val"))
    model = make_pipeline(StandardScaler(), SVC(C=10, gamma=1 / train.shape[1]))
    accuracy = 100 * model.fit(train, archive["train_labels"]).score(val, archive["val_labels"])
    assert accuracy == pytest.approx(float(row("README.md", "pixels (RBF-SVM) |")[2]), abs=0.2)
