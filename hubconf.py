"""Entry points of torch.hub: torch.hub.load(FOLDER_OR_REPOSITORY, "mae_vit_base_patch16", pretrained=True).

Every architecture is an entry point, with the arguments of `mae.get_model`. torch.hub ignores names with a
leading underscore.
"""

import functools as _functools

from mae.inference import model as _model

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "tifffile", "yaml", "safetensors", "tensorboard",
                "tqdm", "matplotlib", "huggingface_hub"]  # fmt: skip

for _name in _model.ARCHITECTURES:
    globals()[_name] = _functools.update_wrapper(_functools.partial(_model.get_model, _name), _model.get_model)
