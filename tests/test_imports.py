"""Imports of scripts at the start: --help and error messages are fast."""

import json
import subprocess
import sys

from conftest import ROOT

SCRIPTS = ("main_pretrain", "main_finetune", "main_linprobe", "main_knn", "main_compare",
           "main_segment", "submitit_pretrain",
           "mae.inference.predict", "mae.inference.features", "mae.inference.reconstruct", "mae.inference.maps",
           "mae.inference.segment", "mae.inference.neighbors", "mae.inference.report", "mae.inference.export",
           "mae.recommend.check",
           "mae.checkpoints.sharded", "hubconf")  # fmt: skip
# Each takes from half a second to two seconds to import; PyTorch itself takes two.
SLOW = ("torchvision", "timm", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor",
        "torch.distributed.checkpoint", "tensorboard", "matplotlib", "sklearn", "scipy", "transformers",
        "datasets", "torchcodec", "onnx", "gradio")  # fmt: skip


def test_scripts_and_models_import_slow_packages_at_their_use():
    """torchvision is imported for the crops of a run, FSDP for --fsdp, timm for fine-tuning. Training does not import
    the functions of `mae`.
    """
    code = f"""
import json, sys
import main_pretrain, main_finetune, main_linprobe, main_segment
assert "mae.inference" not in sys.modules
from mae import get_model, inference_model, list_models
import models_mae, models_vit, {", ".join(SCRIPTS)}
main_pretrain.get_args_parser(), main_finetune.get_args_parser()
models_mae.mae_vit_mini_patch4(), models_vit.vit_mini_patch4()
print(json.dumps(list(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout))
    assert set(SCRIPTS) <= modules
    assert sorted(modules & set(SLOW)) == []


def test_features_of_pictures_import_no_slow_package(pretrain):
    """A prediction takes little longer than importing PyTorch: torchvision imports the compiler of PyTorch."""
    code = f"""
import json, sys
from PIL import Image
from mae import get_model
model = get_model({str(pretrain(epochs=1) / "checkpoint-0.pth")!r})
assert model.extract_feat([Image.new("RGB", (40, 30)), Image.new("L", (16, 16))]).shape[0] == 2
print(json.dumps(list(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(set(json.loads(done.stdout)) & set(SLOW)) == []
