"""The features of a frozen teacher as the target (EVA, Fang et al. 2023, section 2), also of visible patches.

    python main_pretrain.py --model_class examples.frozen_teacher:FrozenTeacher \\
        --model_args teacher=vit_base_patch16_dinov3 --mask_ratio .4 ...
    python main_pretrain.py --model mae_vit_tiny_patch16 --model_class examples.frozen_teacher:FrozenTeacher \\
        --model_args teacher=dinov3-small distance=cosine class_token=true --mask_ratio 0 ...

The teacher is any Vision Transformer of timm; a checkpoint of this library: teacher=runs/mine/checkpoint-399.pth; or a
file of `models_dino.py`. The second command distils it to a smaller model: without masked patches, all are scored.
The teacher sees the whole image, normalized by its own mean and std, whatever those of the student are. It has the
student's patch size and number of channels. It is not trained, is always in evaluation mode, and checkpoints do not
contain it.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae import get_model
from mae.data.transforms import renormalization
from mae.weights import model_zoo, reading
from models_mae import MaskedAutoencoderViT
from models_vit import Encoder

# Predictions and targets (B, N, P) -> (B, N)
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda pred, target: (pred - target).square().mean(dim=-1),
    "smooth_l1": lambda pred, target: F.smooth_l1_loss(pred, target, reduction="none").mean(dim=-1),
    "cosine": lambda pred, target: 1 - F.cosine_similarity(pred, target, dim=-1),
}


class FrozenTeacher(MaskedAutoencoderViT):
    """Predicts the normalized features of a teacher for each patch.

    Args:
        teacher: name of a model of timm with patch tokens, or a checkpoint of this library, or a file of DINO.
        weights: file of the weights of a name. Default: its published weights.
        distance: l2, smooth_l1 or cosine.
        class_token: also predict the first class token of the teacher, by a linear layer on that of the student.
        mean, std: those of the student's input, which `mae.build` gives. Default: ImageNet's.

    Raises:
        ValueError: the teacher does not fit, `distance` is unknown, or only one of student and teacher has the mean of
            pixels from 0 to 1.
    """

    scale: Tensor  # from the student's input to that of the teacher, (c, 1, 1)
    shift: Tensor

    scores_visible = True

    def __init__(
        self, *, teacher: str, weights: str = "", distance: str = "l2", class_token: bool = False,
        mean: list[float] | None = None, std: list[float] | None = None, img_size: Any = 224, **arguments: Any,
    ) -> None:  # fmt: skip
        if distance not in DISTANCES:
            raise ValueError(f"model_args=[distance={distance}]: give one of {', '.join(DISTANCES)}")
        file = reading.path_and_model(teacher)[0]
        if file.exists() or teacher in model_zoo.TABLE or model_zoo.is_of_hub(file):
            kind = reading.read(teacher).settings.get("encoder") or ""
            if ":" in kind:
                raise ValueError(
                    f"model_args=[teacher={teacher}]: it has the class {kind}, which a file can't import: export it "
                    f"with mae.inference.export --to safetensors"
                )
            model: Any = get_model(teacher, input_size=img_size)
            self.target_dim = model.cls_token.shape[2]
            of_teacher = model.settings.get("mean"), model.settings.get("std")
        else:
            model = timm.create_model(
                teacher, pretrained=not weights, checkpoint_path=weights, num_classes=0, img_size=img_size,
                in_chans=arguments.get("in_chans", 3),
            )  # fmt: skip
            self.target_dim = model.num_features
            of_teacher = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        super().__init__(img_size=img_size, **arguments)
        scale, shift = renormalization(self.in_chans, (mean, std), of_teacher)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        if class_token and getattr(model, "cls_token", None) is None:
            raise ValueError(f"model_args=[teacher={teacher}, class_token=true]: it has no class token")
        if model.patch_embed.grid_size != self.grid_size:
            raise ValueError(
                f"model_args=[teacher={teacher}]: it has {model.patch_embed.grid_size} patches and the model "
                f"{self.grid_size}: give another `patch_size` or `input_size`"
            )
        self.distance = DISTANCES[distance]
        self.teacher = (model.eval().requires_grad_(False),)  # in a tuple: not a module of this one
        self.decoder_class = nn.Linear(self.cls_token.shape[2], self.target_dim) if class_token else None

    def prepare_masking(self, *args: Any, **context: Any) -> tuple[Tensor, float, dict[str, Any]]:
        """As in the base class. The teacher runs here, in the precision of the training; the loss is in fp32."""
        imgs, mask_ratio, context = super().prepare_masking(*args, **context)
        return imgs, mask_ratio, {**context, "of_teacher": self.features(imgs)}

    def forward_decoder(self, latent: Tensor, *args: Any, **context: Any) -> Tensor:
        """Returns predictions of the patches (B, N, P), after that of the class token with `class_token`."""
        pred = super().forward_decoder(latent, *args, **context)
        return pred if self.decoder_class is None else torch.cat([self.decoder_class(latent[:, :1]), pred], dim=1)

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor, **context: Any) -> Any:
        """The distance of the masked patches, or of all patches if none is masked, and that of the class token."""
        loss = self.distance(pred, self.target(imgs, **context))
        of_patches = loss[:, -mask.shape[1] :]
        scored = torch.where(mask.any(), mask, 1)
        patches = (of_patches * scored).sum() / scored.sum()
        return patches if self.decoder_class is None else {"patches": patches, "class": loss[:, 0].mean()}

    def target(self, imgs: Tensor, **context: Any) -> Tensor:
        features = context["of_teacher"] if "of_teacher" in context else self.features(imgs)
        return F.layer_norm(features.float(), features.shape[-1:])

    @torch.no_grad()
    def features(self, imgs: Tensor) -> Tensor:
        """The student's input (B, c, H, W) -> features of the teacher (B, N, P), after that of the class token."""
        teacher = self.teacher[0].to(imgs.device)
        imgs = imgs * self.scale + self.shift
        is_ours = isinstance(teacher, Encoder)
        tokens = teacher.get_intermediate_layers(imgs)[0] if is_ours else teacher.forward_features(imgs)
        features = tokens[:, teacher.num_prefix_tokens :]
        if self.decoder_class is not None:
            features = torch.cat([tokens[:, :1], features], dim=1)
        return features
