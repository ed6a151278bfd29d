"""A decoder of another width (He et al. 2021, table 1b): the width is an argument of the model, and no flag.

    python main_pretrain.py --model_class examples.wide_decoder:WideDecoder --model_args width=128 ...

A head has 32 channels, as in the published models.
"""

from typing import Any

from models_mae import MaskedAutoencoderViT


class WideDecoder(MaskedAutoencoderViT):
    """A masked autoencoder with this decoder.

    Args:
        width: channels of the decoder, a multiple of 32.
    """

    def __init__(self, *args: Any, width: int, **kwargs: Any) -> None:
        if width < 32 or width % 32:
            raise ValueError(f"model_args=[width={width}]: give a multiple of 32")
        kwargs |= {"decoder_embed_dim": width, "decoder_num_heads": width // 32}
        super().__init__(*args, **kwargs)
