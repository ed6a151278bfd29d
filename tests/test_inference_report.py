"""The page about a pre-training run: what it shows, that it is one file, and the commands that it names."""

import base64
import html
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden_settings import parser_of
from mains import call, fails, in_processes, lines, weights
from PIL import Image

import main_knn
import main_linprobe
from mae.cli import entry_point
from mae.evaluate import pictures
from mae.inference import export, get_model, report

PACKAGES = {"mae.data": "mae.recommend.check"}  # with a command


class Page(HTMLParser):
    """The images, texts of commands, addresses and names of tags of a page."""

    def __init__(self, file):
        super().__init__()
        self.text = file.read_text(encoding="utf-8")
        self.tags, self.images, self.addresses, self.words = set(), [], [], []
        self.feed(self.text)
        lines = re.findall(r"<pre>(.*?)</pre>", self.text)
        self.commands = [shlex.split(html.unescape(re.sub("</?span>", "", line))) for line in lines]

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"])
            assert values["alt"]
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)

    def pictures(self):
        """The sizes of the pictures, and the drawings of the curves."""
        sizes, drawings = [], []
        for address in self.images:
            kind, content = re.fullmatch(r"data:image/([a-z+]+);base64,(.*)", address).groups()
            content = base64.b64decode(content, validate=True)
            if kind == "svg+xml":
                drawings.append(ET.fromstring(content))
            else:
                sizes.append(Image.open(io.BytesIO(content)).size)
        return sizes, drawings


@pytest.fixture(scope="module")
def run(pretrain_once, labelled):
    return pretrain_once("a<b>&c", data_path=labelled, epochs=3, probe_every=2, input_size=16)


@pytest.fixture(scope="module")
def page(run):
    return Page(call(report, run, device="cpu", num_workers=0))


def test_the_page_is_one_file(page, run):
    assert sorted(run.glob("report*")) == [run / "report.html"]
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags and "link" not in page.tags
    style = re.search(r"<style>(.*?)</style>", page.text, re.DOTALL)[1]
    assert "@import" not in style and "url(" not in style


def test_curves_reconstructions_and_neighbors_are_shown(page):
    """Losses, shares and k-NN accuracies have a figure each, rank and uniformity one; pictures are in two halves."""
    sizes, drawings = page.pictures()
    assert len(drawings) == 5
    step = 16 * 7 + 2
    assert sizes == [(4 * step - 2, 6 * step - 2)] * 2 + [(7 * step - 2, 6 * step - 2)] * 2


def test_the_numbers_are_those_of_the_log(page, run):
    text, entries = " ".join(page.words), lines(run)
    assert "3 of 3" in text
    for name in ("train_loss", "test_loss", "test_knn_acc1"):
        assert f"{entries[-1][name]:.4g}" in text
    assert re.search(r"\d+\.\d% of the 6 nearest neighbors have the label", text)
    assert "mae_vit_mini_patch4 on 48 images" in text


def test_names_are_escaped(page):
    assert "<b>" not in page.text.partition('class="facts"')[0]
    assert "Pre-training run a<b>&c" in page.words


def test_all_settings_are_listed(page, run):
    settings = json.loads((run / "environment.jsonl").read_text().splitlines()[-1])["settings"]
    _, others, every = page.text.split("<details>")
    shown = dict(re.findall(r"<dt>(\w+)</dt> <dd>(.*?)</dd>", every))
    assert {name: html.unescape(value) for name, value in shown.items()} == {n: str(v) for n, v in settings.items()}
    changed = re.findall(r"<dt>(\w+)</dt>", others)
    assert {"epochs", "input_size", "probe_every", "torch"} <= {*changed} and "weight_decay" not in changed


def test_the_commands_of_the_page_parse_and_name_the_checkpoint(page, run, capsys):
    *commands, _ = page.commands  # the last is that of the run
    assert [words[2] for words in commands] == [
        "mae.data", "mae.inference.report", "main_knn", "mae.inference.features", "mae.inference.neighbors",
        "mae.inference.image_map", "mae.inference.export",
    ]  # fmt: skip
    for python, option, module, *flags in commands:
        assert (python, option) == ("python", "-m")
        assert {str(run / "checkpoint-2.pth"), str(run)} & {*flags}
        assert entry_point.parse_command(parser_of(PACKAGES.get(module, module)), flags)
    capsys.readouterr()
    call(main_knn, *commands[2][3:], k=5, device="cpu", num_workers=0)
    assert "* 5-NN Acc@1" in capsys.readouterr().out


def test_the_commands_of_few_images_with_a_bad_one_and_another_encoder_run(pretrain, labelled, tmp_path, capsys):
    """Fewer images than k, too few for a map, one that can't be read, and class tokens that timm does not have."""
    images = shutil.copytree(labelled / "train", tmp_path / "images")
    for file in sorted(images.glob("*/*"))[::3] + sorted(images.glob("*/*"))[1::3]:
        file.unlink()
    min(images.glob("*/*")).write_bytes(b"")
    out = pretrain(data_path=images, epochs=1, on_bad_image="skip", num_cls_tokens=2)
    commands = {words[2]: words[3:] for words in Page(call(report, out, device="cpu", num_workers=0)).commands[:-1]}
    assert "mae.inference.image_map" not in commands
    for module, flags in commands.items():
        assert entry_point.parse_command(parser_of(PACKAGES.get(module, module)), flags)
    capsys.readouterr()
    call(main_knn, *commands["main_knn"], device="cpu", num_workers=0)
    assert "Acc@1" in capsys.readouterr().out
    *flags, _ = commands["mae.inference.export"]
    call(export, *flags, tmp_path / "encoder.safetensors")
    assert (tmp_path / "encoder.safetensors").exists()


def test_images_that_can_not_be_evaluated_are_in_no_command(pretrain, labelled, tmp_path):
    images = shutil.copytree(labelled, tmp_path / "images")
    (images / "val/kind5").rename(images / "val/other")
    page = Page(call(report, pretrain(data_path=images, epochs=1), device="cpu", num_workers=0))
    assert [words[4] for words in page.commands[:2]] == ["LABELLED"] * 2


def test_a_run_ends_with_the_command_of_its_page(pictures, tmp_path):
    """In new processes. Without val/, the commands hold out a part of the training images."""
    out = tmp_path / "my run"
    output = in_processes(1, pictures, out, "--epochs", 1, "--batch_size", 4)
    assert output.splitlines()[-1].startswith("1 epoch in 0:0")
    title, _, command = output.splitlines()[-2].partition(": ")
    assert title == "report"
    words = [sys.executable, *shlex.split(command)[1:], "--device", "cpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {out / 'report.html'}"
    page = Page(out / "report.html")
    assert page.commands[0][3:5] == ["--data_path", str(pictures)]
    title, _, command = output.splitlines()[-3].partition(": ")
    assert (title, shlex.split(command)) == ("fine-tune", page.commands[0])
    sizes, drawings = page.pictures()
    assert (len(sizes), len(drawings)) == (4, 0)


def test_images_without_labels_that_have_moved(pretrain, pictures, tmp_path, capsys, monkeypatch):
    images = tmp_path / "flat"
    images.mkdir()
    for file in (pictures / "train").glob("*/*"):
        shutil.copy(file, images)
    out = pretrain(data_path=images, epochs=1, norm_pix_loss=True)
    moved = images.rename(tmp_path / "moved")
    assert str(images) in fails(capsys, monkeypatch, report, out, "--device", "cpu")
    page = Page(call(report, out, data_path=moved, device="cpu", num_workers=0))
    text = " ".join(page.words)
    assert "class token (the published default; the file does not tell)" in text
    assert "LABELLED has images" in text and "nearest neighbors have" not in text
    assert [words[4] for words in page.commands[:2]] == ["LABELLED"] * 2
    assert page.commands[2][3] == str(moved)


def test_a_run_directory_makes_the_command_import_no_code(pretrain, own_module, tmp_path, capsys, monkeypatch):
    """The user names the code, as the last line of the run does."""
    image = "np.full((16, 16, 3), 9 * number, np.uint8)"
    code = f"def make(split, data_path):\n    return [({image}, 0) for number in range(8)]\n"
    own_module("gray_images", f"import numpy as np\n{code}")
    out = pretrain(dataset="py:gray_images:make", epochs=1)
    command = capsys.readouterr().out.splitlines()[-2]
    assert command == f"report: python -m mae.inference.report {out} --dataset py:gray_images:make"
    sys.modules.pop("gray_images")
    assert "dataset=py:gray_images:make" in fails(capsys, monkeypatch, report, out, "--device", "cpu")
    assert "gray_images" not in sys.modules
    call(report, *shlex.split(command)[4:], device="cpu", num_workers=0)
    assert (out / "report.html").exists()


@pytest.mark.parametrize("own", ["cross_decoder:CrossDecoder", "wide_decoder:WideDecoder"])
def test_a_run_whose_class_has_another_decoder(own, pretrain):
    """The encoder is loaded, and nothing is reconstructed."""
    arguments = {"model_args": "width=32"} if own.startswith("wide") else {}
    out = pretrain(model_class=f"examples.{own}", epochs=1, **arguments)
    page = Page(call(report, out, device="cpu", num_workers=0))
    assert "Reconstructions" not in page.words and "Nearest neighbors" in page.words
    encoder = get_model(out / "checkpoint-0.pth").state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in weights(out, "checkpoint-0.pth").items()
               if name.startswith("blocks."))  # fmt: skip


def test_reconstructions_know_the_invalid_pixels(pretrain, tmp_path, monkeypatch):
    """As in training: patches without valid pixels are never visible."""
    for number in range(8):
        pixels = np.random.default_rng(number).integers(1, 256, (16, 16)).astype(np.uint8)
        pixels[:8] = 0
        (tmp_path / "images/train/0").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"images/train/0/{number}.png")
    shape = {"in_chans": 1, "input_size": 16, "crop": "none", "hflip": 0}
    out = pretrain(data_path=tmp_path / "images", nodata="0", **shape, epochs=1, batch_size=4)
    drawn, reconstruction = [], pictures.reconstruction

    def draw(*arguments, context, **options):
        drawn.append(context["valid"])
        return reconstruction(*arguments, context=context, **options)

    monkeypatch.setattr(pictures, "reconstruction", draw)
    call(report, out, device="cpu", num_workers=0)
    (valid,) = drawn
    assert not valid[:, :8].any() and valid[:, 8:].all()


def test_other_directories_are_refused(classify, tmp_path, capsys, monkeypatch):
    probed = classify(main_linprobe, epochs=1)
    assert "main_linprobe.py" in fails(capsys, monkeypatch, report, probed)
    assert str(tmp_path / "none") in fails(capsys, monkeypatch, report, tmp_path / "none")
