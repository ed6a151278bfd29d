"""For torch.hub: torch.hub.load(FOLDER_OR_REPOSITORY, "mae_vit_base_patch16", pretrained=True).

Every architecture is an entry, with the arguments of `inference.get_model`.
"""

from functools import partial, update_wrapper

from inference.model import ARCHITECTURES, get_model

dependencies = ["torch", "timm", "huggingface_hub", "safetensors", "tifffile"]

for _name in ARCHITECTURES:
    globals()[_name] = update_wrapper(partial(get_model, _name), get_model)
