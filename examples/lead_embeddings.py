"""One-dimensional patches of signals, with an embedding of each lead: ST-MEM (Na et al. 2024).

    python main_pretrain.py --model mae_vit_tiny_patch16 --encoder examples.lead_embeddings:LeadEmbeddings \\
        --input_size 12 2250 --patch_size 1 75 --in_chans 1 --crop none --hflip 0 ...

An image has one row for each lead, and a patch is a part of one row.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models_vit import Encoder


class LeadEmbeddings(Encoder):
    """Adds a learned embedding of the lead to the tokens of each row."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        leads = self.patch_embed.grid_size[0]
        width = self.cls_token.shape[2]
        self.lead_embed = nn.Parameter(torch.empty(leads, 1, width).normal_(std=0.02))

    def tokenize(self, imgs: Tensor, **context: Any) -> Tensor:
        rows = self.patch_embed.grid_of(*imgs.shape[-2:])[0]
        if rows != len(self.lead_embed):
            raise ValueError(f"the images have {rows} leads, and the model {len(self.lead_embed)}")
        leads = super().tokenize(imgs, **context).unflatten(1, (rows, -1))  # (B, leads, columns, D)
        return (leads + self.lead_embed).flatten(1, 2)
