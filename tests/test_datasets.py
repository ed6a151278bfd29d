"""Opening datasets, and the command that checks a dataset."""

import shutil
import tarfile

import forks
import numpy as np
import pytest
from mains import parse
from PIL import Image

from util import datasets, dist, plain_data
from util.cli import entry_point
from util.data import image_facts
from util.data.archives import Archive
from util.data.decode import BadImage
from util.data.sources import Files
from util.datasets import open_source


def test_open_source_reads_the_folder_of_a_split_or_all_images(pictures):
    assert len(open_source("train", str(pictures))) == 24
    assert open_source("train", str(pictures)).classes == ["cat", "dog"]
    assert len(open_source("train", str(pictures / "train" / "cat"))) == 12


def test_training_images_are_never_used_for_validation(pictures, tmp_path):
    with pytest.raises(ValueError, match=r" val/ (.|\n)*--val_list FILE"):
        open_source("val", str(pictures))
    with pytest.raises(ValueError, match=r"set.zip: .* val/ (.|\n)*--val_list FILE"):
        open_source("val", shutil.make_archive(str(tmp_path / "set"), "zip", pictures))
    shutil.copytree(pictures / "train", tmp_path / "only" / "val")
    assert isinstance(open_source("val", str(tmp_path / "only")), Files)
    with pytest.raises(ValueError, match=" train/ "):
        open_source("train", str(tmp_path / "only"))


def test_splits_are_in_lower_case(pictures, tmp_path):
    for folder in ("Train", "Val"):
        shutil.copytree(pictures / "train", tmp_path / "set" / folder)
    for path in (tmp_path / "set", shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path, "set")):
        for split, folder in (("train", "Train"), ("val", "Val")):
            with pytest.raises(ValueError, match=f"rename {folder}/ to {split}/"):
                open_source(split, str(path))
    (tmp_path / "set" / "Val").rename(tmp_path / "set" / "Car")  # two classes
    assert open_source("train", str(tmp_path / "set")).classes == ["Car", "Train"]


def test_lists_and_archives(pictures, tmp_path):
    (tmp_path / "list.txt").write_text("dog/00.PNG\n")
    assert len(open_source("train", str(pictures / "train"), str(tmp_path / "list.txt"))) == 1
    assert isinstance(open_source("train", shutil.make_archive(str(tmp_path / "set"), "zip", pictures)), Archive)


def test_rank_0_lists_the_images_for_all(pictures, tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("cat/01.jpg\n")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(pictures / "train/cat/01.jpg", "0.jpg")
    opened = [
        {"data_path": str(pictures)},
        {"data_path": str(pictures / "train" / "cat")},
        {"data_path": str(pictures / "train"), "file_list": str(tmp_path / "list.txt")},
        {"data_path": shutil.make_archive(str(tmp_path / "set"), "tar", pictures)},
        {"dataset": f"wds:{tmp_path}/shard.tar"},
    ]
    calls = []

    def copied(compute, *types):
        calls.append(compute)
        return plain_data.loads(plain_data.dumps(compute(), types), types)

    for arguments in opened:
        own = open_source("train", **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(dist, "from_rank_0", copied)
            other = open_source("train", **arguments)
        assert len(other) == len(own)
        if "dataset" not in arguments:
            assert [other[index] for index in range(len(own))] == [own[index] for index in range(len(own))]
    assert len(calls) == len(opened)


def test_missing_data_path_and_missing_folder_are_errors(tmp_path):
    with pytest.raises(ValueError, match="--data_path"):
        open_source("train")
    with pytest.raises(ValueError, match=r"--data_path .*nowhere: "):
        open_source("train", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"--val_list .*--dataset"):
        open_source("val", None, "list.txt", "CIFAR10")


def check(*argv) -> None:
    """Runs the command in this process."""
    datasets.main(entry_point.parse(datasets.get_args_parser(), list(map(str, argv))))


def test_the_check_reports_good_images(pictures, tmp_path):
    text = forks.run("util/datasets.py", [pictures, "--num_workers", 1], tmp_path / "output")
    output = dict(line.split(maxsplit=1) for line in text.splitlines()[1:])
    assert output["images"] == "24"
    assert output["classes"] == "2, of 12 to 12 images"
    assert output["unreadable"] == "0"
    assert "1: 5 images" in output["channels"]
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in (pictures / "train").rglob("*.*")]
    values = np.concatenate([p.reshape(-1, 3) for p in pixels]) / 255
    np.testing.assert_allclose(np.array(output["--mean"].split(), float), values.mean(axis=0), atol=6e-4)
    np.testing.assert_allclose(np.array(output["--std"].split(), float), values.std(axis=0), atol=6e-4)
    heights = [len(p) for p in pixels]
    assert f"{min(heights)} to {max(heights)} x" in output["sizes"]
    assert "images/s read and decoded" in output["speed"]


def test_the_check_reports_bad_images(tmp_path, capsys):
    for number in range(3):
        Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.jpg").write_bytes(b"")
    with pytest.raises(BadImage, match=r"1 of 4 .*--on_bad_image skip"):
        check(tmp_path, "--in_chans", 1, "--num_workers", 0)
    output = capsys.readouterr().out
    assert f"unreadable  1\n            {tmp_path / 'bad.jpg'}: the file is empty" in output
    assert "depth       3 images of more than 8 bits" in output
    assert "classes     none" in output


def test_the_check_takes_the_list_of_its_part(tmp_path, capsys):
    for number in range(3):
        Image.new("L", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "train.txt").write_text("0.png\n")
    (tmp_path / "val.txt").write_text("1.png\n2.png\n")
    lists = {"train_list": tmp_path / "train.txt", "val_list": tmp_path / "val.txt", "num_workers": 0}
    for split, count in (("train", 1), ("val", 2)):
        datasets.main(parse(datasets, **lists, split=split))
        assert f"images      {count}\n" in capsys.readouterr().out


def test_images_of_more_than_8_bits_need_both_statistics(pretrain, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    for number in range(4):
        Image.fromarray(np.full((16, 16), 10_000 * number, np.uint16)).save(tmp_path / f"deep/{number}.png")
    flags = {"data_path": tmp_path / "deep", "in_chans": 1, "epochs": 1, "warmup_epochs": 0}
    for given in ({"mean": 0.5, "std": 0.5}, {"mean": 0.5}, {"std": 0.5}):
        pretrain("-".join(given), **flags, **given)
        assert capsys.readouterr().out.count("more than 8 bits") == (len(given) == 1)


def test_the_check_limits_the_number_of_images(pictures, capsys):
    check(pictures, "--limit", 5, "--num_workers", 0)
    assert "images      24, of which 5 were read" in capsys.readouterr().out


def test_the_check_of_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=f"--data_path {tmp_path}/nowhere: "):
        check(tmp_path / "nowhere")


def test_the_check_reads_streams(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(4):
            Image.new("L", (8, 6)).save(tmp_path / "1.png")
            writer.write({"__key__": str(number), "png": (tmp_path / "1.png").read_bytes() if number else b""})
    source = open_source("train", dataset=f"wds:{tmp_path}/a.tar")
    looks = list(image_facts.all_facts(source, 1, [0, 1, 2, 3], 0))
    assert [look.size for look in looks] == [(6, 8)] * 3 + [(0, 0)]
    assert looks[3].unreadable == (f"{tmp_path}/a.tar: 0", "the file is empty")


def test_flags_without_effect_warn(pictures, caplog):
    open_source("train", str(pictures), download=True, num_images=7)
    assert "--download has no effect with this dataset" in caplog.text
    assert "--num_images has no effect with this dataset" in caplog.text
    caplog.clear()
    open_source("train", str(pictures))
    assert "no effect" not in caplog.text


def test_the_check_counts_images_with_an_orientation(tmp_path, capsys):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        Image.new("RGB", (8, 6)).save(tmp_path / f"{orientation}.jpg", exif=exif)
    check(tmp_path, "--num_workers", 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "EXIF" in line]
    assert line.split()[1] == "7"
