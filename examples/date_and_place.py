"""Date and place of an image in its tokens, after the temporal encoding of SatMAE (Cong et al. 2022, section 3.2).

    python main_pretrain.py --train_list images.csv --extras lat lon day \\
        --encoder examples.date_and_place:DateAndPlace ...

The list has columns of latitude and longitude in degrees, and of the day of the year. A dataset of your own may return
them as extra inputs. All scripts that use the encoder need them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models_vit import Encoder


class DateAndPlace(Encoder):
    """Adds a projection of date and place to all patch tokens of an image. It starts as zero: the plain encoder.

    Args:
        harmonics: number of sines and cosines of each angle; the k-th has k periods.
    """

    def __init__(self, *, harmonics: int = 4, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.harmonics = harmonics
        self.place_embed = nn.Linear(6 * harmonics, self.cls_token.shape[2])
        nn.init.zeros_(self.place_embed.weight)
        nn.init.zeros_(self.place_embed.bias)

    def tokenize(  # type: ignore[override]
        self, imgs: Tensor, lat: Tensor, lon: Tensor, day: Tensor, **context: Any
    ) -> Tensor:
        angles = torch.stack([lat / 180, lon / 360, day / 365.25], dim=1) * (2 * math.pi)  # (B, 3)
        angles = angles.unsqueeze(2) * torch.arange(1, self.harmonics + 1, device=imgs.device)  # (B, 3, harmonics)
        waves = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
        return super().tokenize(imgs, **context) + self.place_embed(waves).unsqueeze(1)
