"""The protocols of a comparison: how an encoder is evaluated, with which settings, and which encoders have none."""

import mae.build
from mae import lora, user_code
from mae.compare import summary
from mae.compare.encoders import Encoder
from mae.compare.store import Settings
from mae.settings import specs

KNN = "knn"
LINEAR = "linear"
ATTENTIVE = "attentive"
LORA = "lora"
FINETUNE = "finetune"
FITTED = (KNN, LINEAR)  # protocols that train nothing: predictors are fitted on features
TUNED = (LORA, FINETUNE)  # protocols that train the encoder
TITLES = {
    KNN: summary.KNN, LINEAR: "linear probe", ATTENTIVE: "attentive probe", LORA: "LoRA", FINETUNE: "fine-tuned",
}  # fmt: skip
# The settings of each training without a recipe.
DEFAULTS: dict[str, Settings] = {
    ATTENTIVE: {"cache_features": True, "epochs": 60, "warmup_epochs": 5, "batch_size": 256, "eval_every": 60,
                "save_every": 60, "blr": [0.3, 1, 3, 10, 30], "probe": "attentive"},
    LORA: {"batch_size": 128, "blr": 1e-2, "layer_decay": 1},
    FINETUNE: {"batch_size": 128},
}  # fmt: skip
RANK = 8  # of low-rank updates
RATE_OF_LORA = 10  # times the rate of all weights: updates of few parameters need a larger one


def row_of(encoder: str, protocol: str) -> str:
    """Returns the title of a row of the table."""
    return summary.row_of(encoder, TITLES.get(protocol, protocol))


def reason_against(encoder: Encoder, protocol: str) -> str:
    """Returns why an encoder can't be evaluated with a protocol; "" if it can."""
    if protocol in TUNED and encoder.without:
        return "models of timm are frozen encoders, and are not fine-tuned"
    if protocol != LORA:
        return ""
    if not encoder.settings.get("finetune"):
        return "below the updates, random weights would stay as they are"
    kind = user_code.named_object("encoder", encoder.architecture.get("encoder"))
    if kind:
        model = mae.build.frozen_encoder(*specs(encoder.architecture), kind)
        try:
            lora.add_updates(model, RANK, None)
        except ValueError as error:
            return str(error)
    return ""
