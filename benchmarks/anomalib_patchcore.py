"""The PatchCore of anomalib on given features. `anomalies.py` starts it in an environment with anomalib.

    python benchmarks/anomalib_patchcore.py GIVEN.npz RESULT.npz GIVEN.npz RESULT.npz ...

GIVEN has the outputs of blocks for normal and for tested images, `normal0` (n, D, h, w), `normal1`, ..., `tested0`,
..., and the `input_size` of the images (2,). RESULT has the `scores` (m,) and `maps` (m, H, W) of the tested images,
the `distances` of their patches (m, h, w), the `embeddings` (h * w, D) of the first of them, and the `memory` (M, D), a
tenth of the patches of the normal images.
"""

import sys
from pathlib import Path
from typing import Any


def main(given_file: Path, result_file: Path) -> None:
    """Fits the memory, and scores the tested images."""
    import numpy as np
    import torch
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel  # type: ignore[import-not-found]

    with np.load(given_file) as file:
        given = {name: torch.from_numpy(file[name]) for name in file.files}
    layers = [name.removeprefix("normal") for name in given if name.startswith("normal")]
    model: Any = PatchcoreModel(layers=["layer2"], backbone="resnet18", pre_trained=False)
    model.layers = layers
    found: dict[str, list[Any]] = {"scores": [], "maps": [], "distances": [], "embeddings": []}
    torch.manual_seed(0)

    def run(kind: str) -> None:
        count = len(given[f"{kind}{layers[0]}"])
        for part in torch.arange(count).split(50):
            maps = {layer: given[f"{kind}{layer}"][part] for layer in layers}
            model.feature_extractor = lambda _, maps=maps: maps
            output = model(torch.zeros(len(part), 3, *given["input_size"].tolist()))
            if kind == "tested":
                found["scores"].append(output.pred_score)
                found["maps"].append(output.anomaly_map[:, 0])

    def record(_: Any, inputs: Any) -> None:
        found["distances"].append(inputs[0][:, 0])

    del model.feature_extractor  # a module, which a function replaces
    model.anomaly_map_generator.register_forward_pre_hook(record)
    model.train()
    run("normal")
    model.subsample_embedding(0.1)
    model.eval()
    run("tested")
    pooled = {layer: model.feature_pooler(given[f"tested{layer}"][:1]) for layer in layers}
    embeddings = model.reshape_embedding(model.generate_embedding(pooled))
    result: dict[str, Any] = {name: torch.cat(values).numpy() for name, values in found.items() if values}
    np.savez(result_file, **result, embeddings=embeddings.numpy(), memory=model.memory_bank.numpy())


if __name__ == "__main__":
    for given, result in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        main(Path(given), Path(result))
