"""Checks the published files: digests, loading, and predictions. It needs a network.

    ./run test-released                        # downloads about 14 GB, once
    ./run test-released --names mae_finetuned_vit_base --data_path IMAGENET

Classifiers are evaluated on ImageNet's validation images where --data_path is given, and must reach their published
top-1 to .1 points (but for that at 448 pixels, which was published for another crop). Logits, or the reconstruction
loss, of a fixed photograph are printed.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import main_finetune
import models_mae
import models_vit
from mae.cli import entry_point
from mae.data import transforms
from mae.data.decode import decode
from mae.data.item import Item
from mae.weights import loading, model_zoo

PHOTO = Path(__file__).parents[1] / "demo/photos/coffee.jpg"


@torch.no_grad()
def check(name: str, data_path: str | None) -> str:
    """Loads a file and returns its result.

    Raises:
        ValueError: it can't be downloaded, does not fit, or its result differs from the published one.
    """
    row, file = model_zoo.TABLE[name], loading.read(name)
    torch.manual_seed(0)  # the decoder of a file without one
    if file.kind != row.kind:
        raise ValueError(f"{name} contains an {file.kind}, not an {row.kind}")
    normalize = transforms.Normalize(*transforms.channel_statistics(3))
    image = normalize(transforms.eval_transform(row.input_size)(Item(decode(PHOTO.read_bytes(), 3))).image.unsqueeze(0))
    if row.kind == model_zoo.CLASSIFIER:
        model = getattr(models_vit, row.model)(img_size=row.input_size, global_pool=True).eval()
        loading.load_classifier(model, file)
        value = model(image).max().item()
    else:
        model = getattr(models_mae, row.model)(norm_pix_loss=row.norm_pix_loss).eval()
        loading.init_mae(model, file)
        noise = torch.rand(1, model.num_patches, generator=torch.Generator().manual_seed(0))
        value = model(image, noise=noise)[0].item()
    said = f"{value:.5f}"
    if data_path and row.kind == model_zoo.CLASSIFIER:
        flags = ["--eval", "--resume", name, "--model", row.model, "--data_path", data_path,
                 "--input_size", str(row.input_size)]  # fmt: skip
        scores = main_finetune.main(entry_point.parse(main_finetune.get_args_parser(), flags))
        said += f", {scores}"
        if row.top1 is not None and row.input_size == 224 and abs(scores.acc1 - row.top1) > 0.1:
            raise ValueError(f"{name}: {scores}, published is {row.top1}")
    return said


def main() -> None:
    released = [name for name, row in model_zoo.TABLE.items() if row.url]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", default=released, choices=released, metavar="NAME")
    parser.add_argument("--data_path", metavar="IMAGENET", help="with val/, to evaluate the classifiers")
    args = parser.parse_args()
    for name in args.names:
        try:
            print(f"{name}: {check(name, args.data_path)}", flush=True)
        except ValueError as error:
            sys.exit(f"test-released: {error}")


if __name__ == "__main__":
    main()
