"""The features of a frozen teacher as the target (EVA, Fang et al. 2023, section 2).

    python main_pretrain.py --model_class examples.frozen_teacher:FrozenTeacher \\
        --model_args teacher=vit_base_patch16_dinov3 --mask_ratio .4 ...

The teacher is any Vision Transformer of timm, or a checkpoint of this library: teacher=runs/mine/checkpoint-399.pth.
The teacher sees the whole image, as the student's input is normalized: give the --mean and --std of the teacher. It has
the student's patch size and number of channels. It is not trained, is always in evaluation mode, and checkpoints do not
contain it.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from mae import get_model
from models_mae import MaskedAutoencoderViT
from models_vit import Encoder


class FrozenTeacher(MaskedAutoencoderViT):
    """Predicts the normalized features of a teacher for each patch.

    Args:
        teacher: name of a model of timm with patch tokens, or a checkpoint of this library.
        weights: file of the weights of a name. Default: its published weights.
    """

    def __init__(self, *, teacher: str, weights: str = "", img_size: Any = 224, **arguments: Any) -> None:
        if Path(teacher).is_file():
            model: Any = get_model(teacher)
            self.target_dim = model.cls_token.shape[2]
        else:
            model = timm.create_model(
                teacher, pretrained=not weights, checkpoint_path=weights, num_classes=0, img_size=img_size,
                in_chans=arguments.get("in_chans", 3),
            )  # fmt: skip
            self.target_dim = model.num_features
        super().__init__(img_size=img_size, **arguments)
        if model.patch_embed.grid_size != self.grid_size:
            raise ValueError(
                f"--model_args teacher={teacher}: it has {model.patch_embed.grid_size} patches and the model "
                f"{self.grid_size}: give another --patch_size or --input_size"
            )
        self.teacher = (model.eval().requires_grad_(False),)  # in a tuple: not a module of this one

    @torch.no_grad()
    def target(self, imgs: Tensor, **context: Any) -> Tensor:
        teacher = self.teacher[0].to(imgs.device)
        is_ours = isinstance(teacher, Encoder)
        tokens = teacher.get_intermediate_layers(imgs)[0] if is_ours else teacher.forward_features(imgs)
        features = tokens[:, teacher.num_prefix_tokens :]
        return F.layer_norm(features.float(), features.shape[-1:])
