"""Settings of the model."""

# fmt: off
from dataclasses import dataclass

from mae.settings.choices import ADAPT_CHOICES, HEAD_CHOICES, NUM_QUERIES, POOL_CHOICES, REGRESSION_LOSSES
from mae.settings.fields import FIXED, FREE, HEAD, LABELS, MODEL, TRAINING, Values, fact, setting
from mae.settings.types import count, non_negative, positive, positive_int, ratio
from mae.sizes import Size


@dataclass(frozen=True)
class ModelSpec(Values, group="model", role=MODEL):
    """What builds a model for images of an `ImageSpec`."""

    model: str = setting("", metavar="NAME")
    patch_size: Size | None = setting(None, positive_int, resumed=FIXED, action="size", metavar=("P", "P"),
        help="patch size in pixels: one number for squares, or height and width (default: the patch size in the name "
        "of the model)")
    num_cls_tokens: int | None = setting(None, positive_int, metavar="T",
        help="number of class tokens; heads and k-NN use their mean (default: as in the loaded weights, else 1)")
    learned_pos_embed: bool = setting(False, action="store_true",
        help="learn the positions of encoder and decoder (default: the fixed sine-cosine tables)")
    layer_norm_eps: float | None = fact(None)  # of foreign models; None: 1e-6
    num_heads: int | None = fact(None, role=TRAINING)  # in foreign files, to be checked
    decoder_num_heads: int | None = fact(None, role=TRAINING)
    encoder: str | None = setting(None, resumed=FIXED, metavar="NAME",
        help="{choices}; or MODULE:CLASS, your own encoder: a class derived from models_vit.Encoder, from a module on "
        "Python's path or in the working directory. Files record its name, and do not import it (default: as in the "
        "loaded weights)")
    encoder_args: list[str] | None = setting(None, resumed=FIXED, action="extend", nargs="+", metavar="NAME=VALUE",
        help="arguments of the class of --encoder, such as groups=3 (default: as in the loaded weights)")
    lora: int | None = setting(None, count, resumed=FIXED, metavar="R",
        help="low-rank updates of queries and values in every block (LoRA, Hu et al. 2022): they are trained, and the "
        "weights below them are frozen; exports merge them. Updates of another rank in the loaded weights are merged; "
        "0: no updates. Nearest neighbors and probes take those of the file only. Typical: 8 to 64 (default: as in the "
        "loaded weights)")
    lora_alpha: float | None = setting(None, positive, resumed=FIXED, metavar="A",
        help="--lora multiplies its updates by A / R (default: as in the loaded weights, else R)")
    model_class: str | None = setting(None, role=TRAINING, metavar="MODULE:CLASS",
        help="your own method: a class derived from models_mae.MaskedAutoencoderViT (docs/method.md). Files record "
        "its name, and do not import it")
    model_args: list[str] | None = setting(None, role=TRAINING, resumed=FIXED, action="extend", nargs="+",
        metavar="NAME=VALUE",
        help="arguments of the class of --model_class, such as bins=9")
    predicts_pixels: bool = fact(True, role=TRAINING)
    qk_norm: str | None = setting(None, choices=("layer", "rms"),
        help="normalize queries and keys of each head, as ViT-22B does, against diverging attention: layer: "
        "LayerNorm; rms: RMSNorm (default: the choice of the loaded weights, else no norm)")
    drop_path: float = setting(0.0, ratio, role=TRAINING, metavar="R",
        help="stochastic depth: drop rate of the last block of the encoder; it grows linearly from 0 at the first")
    grad_checkpointing: bool = setting(False, role=TRAINING, resumed=FREE, action="store_true",
        help="recompute activations in the backward pass: less memory, a third more computation")
    unfreeze_blocks: int | str | None = setting(None, count, group="optimization", role=TRAINING, metavar="K",
        help="train the last K blocks, adapters, and the head or the decoder only (default: all parameters; with "
        "adapters, 0)")
    decoder_depth: int | None = setting(None, positive_int, metavar="N",
        help="number of decoder blocks (default: the model's)")
    norm_pix_loss: bool = setting(False, resumed=FIXED, action="switch",
        help="normalize each target patch by its own mean and variance")
    uniformity: float = setting(0.0, non_negative, role=TRAINING, metavar="W",
        help="weight of a second loss that spreads the class tokens of the images in a batch: the mean squared cosine "
        "over all pairs (U-MAE, Zhang et al. 2022); .1 for batches of 64 small images; 0: none")
    preserve: float = setting(0.0, non_negative, role=TRAINING, metavar="W",
        help="weight of a loss that keeps the features near those of the start, --init_from, for the whole image: 1 - "
        "cosine, half of it of the class token, half of the visible patches; 0: none")
    start_digest: str | None = fact(None, role=TRAINING, resumed=FREE)  # of the file that `preserve` reads
    mask_ratio: float = setting(0.75, ratio, metavar="R", help="fraction of masked patches")
    mask_block: int = setting(1, positive_int, metavar="N",
        help="--masking random masks blocks of NxN patches instead of single patches; Pixio has 4")
    global_pool: bool = setting(False, role=HEAD, action="switch",
        help="classify the mean of the patch tokens",
        off="classify the class token")
    pool: str | None = setting(None, role=HEAD, choices=POOL_CHOICES,
        help="features: cls: the class token, as --cls_token; avg: the mean of the patch tokens, as --global_pool; "
        "both: the two, each of unit length, one after the other (default: what the file is for)")
    nb_classes: int | None = setting(None, positive_int, group="data", role=HEAD, metavar="N",
        help="number of classes, as a check; ids in lists that are below N are outputs (default: the number in the "
        "training set)")
    probe: str | bool | None = setting(None, role=HEAD, help="{choices}")
    num_queries: int = setting(NUM_QUERIES, positive_int, role=HEAD, metavar="Q",
        help="queries of --probe attentive; a divisor of the width of the encoder")
    head: str | None = setting(None, role=HEAD, choices=HEAD_CHOICES,
        help="linear: batch norm and a 1 x 1 convolution on the tokens of the last block; dpt: a dense prediction "
        "transformer on four evenly spaced blocks (Ranftl et al. 2021)")
    regression_loss: str | None = setting(None, group="optimization", role=LABELS, choices=REGRESSION_LOSSES,
        help="loss of --task regression, on standardized targets; huber: l2 below one standard deviation, and l1 "
        "above (default: l1)")
    target_mean: list[float] | None = fact(None, role=LABELS, resumed=FIXED)  # no flag
    target_std: list[float] | None = fact(None, role=LABELS, resumed=FIXED)  # no flag
    classes: list[str] | None = fact(None)  # names of folders, or of targets
    label_names: list[str] | None = fact(None)  # names of labels in foreign files
    masking: str = setting("random", role=TRAINING, help="masked patches: {choices}")
    adapt_input: str = setting("error", role=TRAINING, choices=ADAPT_CHOICES,
        help="if the weights of --finetune have a different number of input channels: error: abort; mean: each "
        "channel starts from the mean of their channels; repeat: from their channels, repeated; skip: the patch "
        "projection is initialized at random")


# Arguments of `models_vit.Block` with the names of settings. Other libraries do not read models that have them.
BLOCK_ARGUMENTS = ("qk_norm",)
# Arguments of `models_mae.MaskedAutoencoderViT` with the names of settings.
OF_AUTOENCODER = ("norm_pix_loss", "uniformity", "learned_pos_embed")
