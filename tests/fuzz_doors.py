"""The doors of `fuzz.py`: valid inputs, functions that damage them, and functions that read them."""

import argparse
import hashlib
import importlib.util
import io
import itertools
import json
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mutations
import numpy as np
import safetensors.torch
import tifffile
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from test_decode import TABLE, saved

import main_pretrain
import models_mae
import models_vit
from mae.checkpoints import checkpoint, sharded_state
from mae.cli import entry_point
from mae.data import jpeg
from mae.data.decode import decode
from mae.data.kinds.archives import open_archive
from mae.data.kinds.lists import read_list
from mae.data.kinds.shards import read_members
from mae.settings.choices import ADAPT_CHOICES
from mae.weights import loading, model_settings, model_zoo, reading


class Door(NamedTuple):
    """A function that reads untrusted files, with its inputs."""

    make_seeds: Callable[[Path], list[Any]]  # whole inputs; the folder is for files that they name
    mutate: Callable[[list[Any], random.Random], Any]
    read: Callable[[Any, Path, random.Random], None]  # in a folder of its own


FORMATS = {b"II*\0": mutations.tiff, b"MM\0*": mutations.tiff, b"\x89PNG": mutations.png,
           b"\xff\xd8": mutations.jpeg}  # fmt: skip
HAS_FAST_JPEG = importlib.util.find_spec("torchcodec") is not None


def _images(folder: Path) -> list[tuple[bytes, int]]:
    seeds = [(data, in_chans) for data, in_chans, *_ in TABLE.values()]
    pixels = np.arange(40 * 48 * 3, dtype=np.uint16).reshape(40, 48, 3)
    for codec, tile in itertools.product(("zlib", "lzma", "lzw", "packbits", "zstd", "jpeg2000"), (None, (16, 16))):
        for values in (pixels, pixels.astype(np.uint8)):
            stream, rows = io.BytesIO(), None if tile else 9
            tifffile.imwrite(stream, values, photometric="rgb", compression=codec, tile=tile, rowsperstrip=rows)
            seeds.append((stream.getvalue(), 3))
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a camera"
    eight = pixels.astype(np.uint8)
    seeds += [(saved(eight, kind, exif=exif), 3) for kind in ("JPEG", "PNG", "WEBP", "AVIF")]
    seeds += [(saved(eight, "JPEG", progressive=True), 3), (saved(eight, "JPEG2000", no_jp2=True), 3)]
    seeds += 3 * [(saved(np.full((4000, 4000, 3), 99, np.uint8), "JPEG", progressive=True), 3)]  # for many scans
    if HAS_FAST_JPEG:
        jpeg.decoder()  # compiles before the processes start
    return seeds


def _mutate_image(seeds: list[tuple[bytes, int]], generator: random.Random) -> tuple[bytes, int]:
    data, in_chans = generator.choice(seeds)
    damage = [damage for start, damage in FORMATS.items() if data.startswith(start)]
    if damage and generator.random() < 0.7:
        return damage[0](data, generator), in_chans
    return mutations.mutate(data, [other for other, _ in seeds], generator), in_chans


def _read_image(made: tuple[bytes, int], folder: Path, generator: random.Random) -> None:
    data, in_chans = made
    in_chans = in_chans if generator.random() < 0.8 else 1
    fast_jpeg = HAS_FAST_JPEG and generator.random() < 0.5
    decode(data, in_chans, upright=generator.random() < 0.5, fast_jpeg=fast_jpeg)


def _archives(folder: Path) -> list[bytes]:
    images = {f"train/{name}/{n}.png": saved(np.full((8, 8, 3), n, np.uint8), "PNG") for name in "ab" for n in range(2)}
    seeds = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            link = zipfile.ZipInfo("train/a/link.png")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "0.png")
            for name, data in images.items():
                archive.writestr(name, data)
        seeds.append(stream.getvalue())
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
            for name, data in images.items():
                member = tarfile.TarInfo(name if kind == tarfile.USTAR_FORMAT else f"{'long/' * 30}{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("train/a/link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "0.png"
            archive.addfile(link)
        seeds.append(stream.getvalue())
    return seeds


def _mutate_archive(seeds: list[bytes], generator: random.Random) -> bytes:
    data = generator.choice(seeds)
    if generator.random() < 0.7:
        return (mutations.zip_directory if data[:2] == b"PK" else mutations.tar_header)(data, generator)
    return mutations.mutate(data, seeds, generator)


def _read_archive(data: bytes, folder: Path, generator: random.Random) -> None:
    if generator.random() < 0.2:
        for member in read_members([{"url": "shard", "stream": io.BytesIO(data)}], lambda error: True):
            assert member == {} or member["data"] is not None
        return
    path = folder / "archive"
    path.write_bytes(data)
    archive = open_archive(path, "train")
    for index in range(min(len(archive), 20)):
        assert archive.name(index).isprintable()
        archive[index]


def _lists(folder: Path) -> list[tuple[str, bytes]]:
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(3)],
        "annotations": [{"image_id": n, "category_id": n % 2} for n in range(3)],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(2)],
    }
    rows = [{"path": f"{n}.png", "label": n} for n in range(3)]
    return [
        (".txt", b"0.png 0\n1.png 1\n2.png 0\n"), (".txt", b"0.png\n1.png\n2.png\n"),
        (".txt", b"0.png\tcat\n1.png\tdog\n"),
        (".csv", b"path,label\n0.png,cat\n1.png,dog\n"), (".csv", b"class,file\n0,0.png\n1,1.png\n"),
        (".json", json.dumps(coco).encode()), (".json", json.dumps(rows).encode()),
        (".json", b'[["0.png", 1], ["1.png", 0]]'),
    ]  # fmt: skip


def _mutate_list(seeds: list[tuple[str, bytes]], generator: random.Random) -> tuple[str, bytes]:
    suffix, data = generator.choice(seeds)
    if generator.random() < 0.3:
        return suffix, mutations.mutate(data, [other for _, other in seeds], generator)
    return suffix, mutations.document(data, generator)


def _read_list(made: tuple[str, bytes], folder: Path, generator: random.Random) -> None:
    path = (folder / "list").with_suffix(made[0])
    path.write_bytes(made[1])
    for number in range(3):
        (folder / f"{number}.png").touch()
    files = read_list(path, None, "--train_list")
    assert all(files.name(index).isprintable() for index in range(len(files)))
    assert all(name.isprintable() for name in files.classes)


def _recipes(folder: Path) -> list[str]:
    recipes = sorted(Path(__file__).parents[1].glob("recipes/pretrain_*.yaml"))
    return [*(path.read_text() for path in recipes), "mean: [0.1, 0.2, 0.3]\ndataset: 'wds:{0..3}.tar'\nhflip: 0.5\n"]


def _mutate_recipe(seeds: list[str], generator: random.Random) -> bytes:
    if generator.random() < 0.2:
        return mutations.mutate(generator.choice(seeds).encode(), [seed.encode() for seed in seeds], generator)
    return mutations.text(generator.choice(seeds), generator).encode(errors="surrogatepass")


def _read_recipe(data: bytes, folder: Path, generator: random.Random) -> None:
    (folder / "recipe.yaml").write_bytes(data)
    try:
        args = entry_point.parse(main_pretrain.get_args_parser(), ["--config", str(folder / "recipe.yaml")])
    except SystemExit as error:
        assert error.code == 2
    else:
        assert "pipe:" not in str(args.data.dataset)


TENSORS = [
    torch.zeros(()), torch.zeros(0), torch.zeros(1, 1).expand(10**6, 10**6), torch.eye(3).to_sparse(),
    torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int8),
    torch.full((192, 3, 8, 8), float("nan")), torch.zeros(1, 5, 192), torch.zeros(1, 1, 192), torch.zeros(1, 5),
    torch.empty(4, 4, device="meta"),
]  # fmt: skip


def _models() -> tuple[Any, Any]:
    return models_mae.mae_vit_mini_patch4(img_size=16), models_vit.vit_mini_patch4(img_size=16, num_classes=3)


def _weights(folder: Path) -> list[dict[str, Any]]:
    """{"file": what torch.save writes}, {"safetensors": ..., "config": ...}."""
    mae, vit = _models()
    args = {"model": "mae_vit_mini_patch4", "input_size": [16, 16], "patch_size": 4, "in_chans": 3, "mean": [0.5] * 3}
    ours = {"model": mae.state_dict(), "args": args, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(())}}}}
    published = {"model": vit.state_dict(), "args": argparse.Namespace(**args)}
    config = {"image_size": 16, "patch_size": 4, "num_channels": 3, "id2label": {"0": "cat", "1": "dog", "2": "cow"}}
    return [
        {"file": ours}, {"file": published}, {"file": vit.state_dict()},
        {"file": {"state_dict": {f"backbone.{name}": t for name, t in vit.state_dict().items()}}},
        {"file": ours, "old": True},
        {"safetensors": vit.state_dict(), "settings": args}, {"safetensors": mae.state_dict(), "config": config},
    ]  # fmt: skip


def _link(generator: random.Random) -> Path:
    """The target of a link in place of a file."""
    targets = ("/dev/zero", "/dev/zero", "/dev/null", "/dev/stdin", ".", "..", "none", "/etc/passwd")
    return Path(generator.choice(targets))


def _other_header(header: bytes, generator: random.Random) -> bytes:
    """A .safetensors header, with its length, that is damaged, very large, or of another length than stated."""
    how = generator.random()
    if how < 0.1:
        number = generator.choice((1_000, 50_000, 800_000))
        header = b"{%s}" % b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(number))
    elif how < 0.8:
        header = mutations.document(header, generator)
    size = len(header).to_bytes(8, "little") if how < 0.9 else mutations.odd_number(8, generator)
    return size + header


def _mutate_weights(seeds: list[dict[str, Any]], generator: random.Random) -> dict[str, bytes | Path]:
    """The files of a checkpoint: {name: bytes, or the target of a link}."""
    seed = generator.choice(seeds)
    how = generator.choice(("bytes", "header", "content", "content"))
    if "file" in seed:
        state, stream = seed["file"], io.BytesIO()
        if how == "content":
            state = mutations.nested(state, generator, [*TENSORS, *mutations.VALUES])
        torch.save(state, stream, _use_new_zipfile_serialization="old" not in seed)
        data = stream.getvalue()
        if how == "header" and "old" in seed:
            data = mutations.flip(data[:3000], [], generator) + data[3000:]
        elif how == "header":
            data = _other_pickle(data, generator)
        return {"weights.pth": mutations.mutate(data, [data], generator) if how == "bytes" else data}
    settings = seed.get("settings", {})
    if how == "content":
        settings = mutations.nested(settings, generator)
    metadata = {reading.SETTINGS: json.dumps(settings)} if "settings" in seed else None
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in seed["safetensors"].items()}, metadata)
    if how == "header":
        size = int.from_bytes(data[:8], "little")
        data = _other_header(data[8 : 8 + size], generator) + data[8 + size :]
    elif how == "bytes":
        data = mutations.mutate(data, [data], generator)
    if "config" not in seed:
        return {"weights.safetensors": data}
    config = json.dumps(seed["config"]).encode()
    if how == "content":
        config = mutations.document(config, generator)
    if generator.random() < 0.3:
        index = json.dumps({"weight_map": {"cls_token": "a.safetensors", "norm": "b.safetensors"}}).encode()
        shards = {"a.safetensors": data, "b.safetensors": _link(generator) if generator.random() < 0.7 else b""}
        return {"model.safetensors.index.json": index, "config.json": config, **shards}
    return {"model.safetensors": data, "config.json": config}


def _other_pickle(data: bytes, generator: random.Random) -> bytes:
    """A checkpoint with damage in the part that holds names and plain values, and the checksums that fit."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(stream, "w") as after:
        compression = zipfile.ZIP_DEFLATED if generator.random() < 0.1 else zipfile.ZIP_STORED
        for member in before.infolist():
            held = before.read(member)
            held = mutations.mutate(held, [held], generator) if member.filename.endswith("data.pkl") else held
            after.writestr(member.filename, held, compression)
    return stream.getvalue()


def _write(files: dict[str, bytes | Path], folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        place = folder / name
        place.symlink_to(data) if isinstance(data, Path) else place.write_bytes(data)
    return folder


def _read_weights(files: dict[str, bytes | Path], folder: Path, generator: random.Random) -> None:
    own = _write(files, folder / "weights")
    path = own if "config.json" in files else own / next(iter(files))
    if path.suffix == ".pth":
        checkpoint.read(path)
    file = loading.read(path)
    mae, vit = _models()
    if generator.random() < 0.3:
        loading.init_mae(mae, file)
    elif file.kind == model_zoo.CLASSIFIER and generator.random() < 0.5:
        loading.load_classifier(vit, file)
    else:
        loading.load_encoder(vit, file, generator.choice(ADAPT_CHOICES))
    model_settings.statistics(file, 3, None, None)


def _sharded(folder: Path) -> list[dict[str, bytes]]:
    """A folder's files, as a sharded run writes them."""
    mae, _ = _models()
    names = {f"model.{name}": tensor for name, tensor in mae.state_dict().items()}
    whole = folder / "checkpoint-0"
    dcp.save(names, storage_writer=dcp.FileSystemWriter(whole), no_dist=True)
    return [{path.name: path.read_bytes() for path in whole.iterdir()} | {"names": json.dumps(list(names)).encode()}]


def _mutate_sharded(seeds: list[dict[str, bytes]], generator: random.Random) -> dict[str, bytes | Path]:
    files: dict[str, Any] = dict(seeds[0])
    names = json.loads(files.pop("names"))
    which = generator.choice((".metadata", ".metadata", *files))
    other = b"\x80\x04\x95" + pickle.dumps(generator.choice(mutations.VALUES[:10]))
    if which in files and generator.random() < 0.8:
        files[which] = mutations.mutate(files[which], [files[which], other], generator)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    state = {"epoch": 0, "tensors": names, "files": digests, "optimizer": {"param_groups": []}, "args": {"model": "a"}}
    if generator.random() < 0.3:
        state = mutations.nested(state, generator)
    stream = io.BytesIO()
    torch.save(state | {"digest": checkpoint.compute_digest(state)} if isinstance(state, dict) else state, stream)
    files[checkpoint.STATE] = stream.getvalue()
    if generator.random() < 0.3:
        files[generator.choice(list(files))] = _link(generator)
    return files


def _read_sharded(files: dict[str, bytes | Path], folder: Path, generator: random.Random) -> None:
    sharded_state.gather(_write(files, folder / "checkpoint-0"))


DOORS = {
    "images": Door(_images, _mutate_image, _read_image),
    "archives": Door(_archives, _mutate_archive, _read_archive),
    "lists": Door(_lists, _mutate_list, _read_list),
    "recipes": Door(_recipes, _mutate_recipe, _read_recipe),
    "weights": Door(_weights, _mutate_weights, _read_weights),
    "sharded": Door(_sharded, _mutate_sharded, _read_sharded),
}
