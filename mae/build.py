"""Builds models from their settings, which a file may record."""

import inspect
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from mae import encoders, lora, masking, user_code
from mae.settings import UNSET, ImageSpec, ModelSpec
from mae.settings.choices import BOTH, TIMM
from mae.settings.model import BLOCK_ARGUMENTS, OF_AUTOENCODER
from mae.settings.values import read_value
from mae.weights import timm_models
from models_mae import DECODERS, MaskedAutoencoderViT, size_of
from models_timm import TimmEncoder
from models_vit import ABOVE_BLOCKS, SIZES, Block, Encoder, LayerNorm, VisionTransformer

if TYPE_CHECKING:
    from models_segment import Segmenter

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Encoder)


def combined(encoder: type[Encoder], model_class: type[Model]) -> type[Model]:
    """Returns the class of a model with a mix-in in front of it. It has the name of the model.

    Raises:
        ValueError: the class is no mix-in.
    """
    _require_mix_in(user_code.name_of(encoder), encoder)
    names = {"encoder_name": encoders.name_of(encoder), "__module__": model_class.__module__}
    return type(model_class.__name__, (encoder, model_class), names)


def _require_mix_in(name: str, encoder: Any) -> None:
    complete = (MaskedAutoencoderViT, VisionTransformer)
    if not (isinstance(encoder, type) and issubclass(encoder, Encoder)) or issubclass(encoder, complete):
        raise ValueError(
            f"encoder={name} is no mix-in: derive it from models_vit.Encoder only; the models are derived from it"
        )


def encoder_arguments(spec: ModelSpec, encoder: type[Encoder] | None) -> dict[str, Any]:
    """Returns the arguments of the constructor of a mix-in, `encoder_args`.

    Raises:
        ValueError: the weights need another mix-in, or it has no such argument.
    """
    if encoder is None:
        if spec.encoder:  # recorded: a file can't make a program import code
            raise ValueError(f"the model has an encoder of its own: give encoder={spec.encoder}")
        if spec.encoder_args:
            raise ValueError("`encoder_args` are arguments of the class of `encoder`, which is not given")
        return {}
    _require_mix_in(str(spec.encoder), encoder)
    return own_arguments(encoder, spec.encoder_args, "`encoder_args`")


def own_parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Returns the keyword-only parameters of the constructors of a class, as far as each passes others on."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            found = {one.name: one for one in parameters if one.kind is one.KEYWORD_ONLY} | found
            if not any(one.kind is one.VAR_KEYWORD for one in parameters):
                break
    return found


def own_arguments(kind: type, texts: Sequence[str] | None, flag: str) -> dict[str, Any]:
    """Returns the arguments of the constructor of a class of the user's code: `name=value`, with a value of YAML.

    Args:
        kind: the class. Its own parameters are keyword-only.
        texts: the values of `flag`.

    Raises:
        ValueError: it has no such argument, which may be an argument of the model.
    """
    known = own_parameters(kind)
    pairs = [text.partition("=")[::2] for text in texts or []]
    for name, value in pairs:
        if name not in known or not value:
            takes = " ".join(f"{one}=VALUE" for one in known) or "no arguments"
            raise ValueError(f"{flag} {name}={value}: {kind.__name__} takes {takes}")
    return {name: read_value(value) for name, value in pairs}


def build(model_class: Callable[..., Model], encoder: type[Encoder] | None, arguments: dict[str, Any]) -> Model:
    """Returns a model, with a mix-in in front of its class. `model_class` may be a `partial` of a class."""
    if encoder is None:
        return model_class(**arguments)
    if isinstance(model_class, partial):
        return build(model_class.func, encoder, {**model_class.keywords, **arguments})
    return combined(encoder, model_class)(**arguments)  # type: ignore[arg-type]


def autoencoder(
    spec: ModelSpec,
    image: ImageSpec,
    model_class: Callable[..., MaskedAutoencoderViT] = MaskedAutoencoderViT,
    encoder: type[Encoder] | None = None,
) -> MaskedAutoencoderViT:
    """Builds the masked autoencoder of a run. A class that takes `mean` and `std` gets those of the images.

    Raises:
        ValueError: as in `autoencoder_arguments` and `own_arguments`.
    """
    encoder = encoder or encoders.class_of(spec.encoder)
    arguments = autoencoder_arguments(spec, image, encoder)
    if spec.model_class and model_class is MaskedAutoencoderViT:  # recorded: a file can't make a program import code
        remedy = "give" if ":" in spec.model_class else "use its own script, or in Python"
        raise ValueError(f"the model has a class of its own: {remedy} model_class={spec.model_class}")
    if model_class is not MaskedAutoencoderViT:
        of_encoder = own_parameters(encoder).keys() if encoder else set[str]()
        kind: Any = getattr(model_class, "func", model_class)
        arguments |= {name: getattr(image, name) for name in ("mean", "std") if name in own_parameters(kind)}
        arguments |= _arguments_of_class(model_class, spec.model_args, arguments.keys() | of_encoder)
    elif spec.model_args:
        raise ValueError("`model_args` are arguments of the class of `model_class`, which is not given")
    return _set_options(build(model_class, encoder, arguments), spec)


def model_class_of(
    name: str | None, model_class: Callable[..., MaskedAutoencoderViT] = MaskedAutoencoderViT
) -> Callable[..., MaskedAutoencoderViT]:
    """Returns the class of the model: the one that the setting `model_class` of the command names, or `model_class`.

    Raises:
        ValueError: both are given, or the class can't be imported or is no masked autoencoder.
    """
    if not name:
        return model_class
    if model_class is not MaskedAutoencoderViT:
        raise ValueError(f"model_class={name} and the argument exclude each other; give one of them")
    found: Any = user_code.import_object("model_class=", name)
    if not (isinstance(found, type) and issubclass(found, MaskedAutoencoderViT)):
        raise ValueError(f"model_class={name}: derive it from MaskedAutoencoderViT")
    return found


def _arguments_of_class(
    model_class: Callable[..., Model], texts: Sequence[str] | None, of_run: Collection[str]
) -> dict[str, Any]:
    """Returns the own arguments of a class or of a `partial` of it. `of_run`: those of the run and of the encoder."""
    kind: Any = getattr(model_class, "func", model_class)
    keywords = getattr(model_class, "keywords", {})
    arguments = keywords | own_arguments(kind, texts, "`model_args`")
    if both := sorted(arguments.keys() & of_run):
        name = user_code.name_of(kind)
        raise ValueError(f"model_class={name}: the run or `encoder` has an argument {both[0]}, too")
    return arguments


def classifier(
    spec: ModelSpec, image: ImageSpec, encoder: type[Encoder] | None = None,
    model_class: Callable[..., VisionTransformer] = VisionTransformer,
) -> VisionTransformer:  # fmt: skip
    """Builds the classifier of a run."""
    encoder = encoder or encoders.class_of(spec.encoder)
    return _set_options(build(model_class, encoder, classifier_arguments(spec, image, encoder)), spec)


def frozen_encoder(spec: ModelSpec, image: ImageSpec, encoder: type[Encoder] | None = None) -> VisionTransformer:
    """Builds the encoder of a run without a head. It may be a model of timm."""
    if spec.model.startswith(TIMM):
        return TimmEncoder(**timm_arguments(spec, image, encoder))
    model = classifier(replace(spec, nb_classes=0), image, encoder)
    model.pools_both = spec.pool == BOTH
    return model


def probe(spec: ModelSpec, image: ImageSpec, encoder: type[Encoder] | None = None) -> VisionTransformer:
    """Builds a frozen classifier with the head of a probe."""
    from mae.probes import set_probe_head

    model = frozen_encoder(spec, image, encoder)
    set_probe_head(model, spec)
    model.freeze()
    return model


def segmenter(spec: ModelSpec, image: ImageSpec, encoder: type[Encoder] | None = None) -> "Segmenter":
    """Builds the segmentation model of a run. Without trained blocks, the encoder stays in evaluation mode."""
    from models_segment import Segmenter

    encoder = encoder or encoders.class_of(spec.encoder)
    model = _set_options(build(Segmenter, encoder, segmenter_arguments(spec, image, encoder)), spec)
    if spec.unfreeze_blocks == 0 and not model.adapters:
        model.freeze()
    return model


def autoencoder_arguments(spec: ModelSpec, image: ImageSpec, encoder: type[Encoder] | None = None) -> dict[str, Any]:
    """Returns the arguments of `MaskedAutoencoderViT` and of a mix-in.

    Raises:
        ValueError: as in `encoder_arguments`.
    """
    decoder: dict[str, Any] = {**DECODERS[size_of(spec.model)]}
    if spec.decoder_depth:
        decoder["decoder_depth"] = spec.decoder_depth
    return {
        **_shape(spec, image, encoder),
        **decoder,
        **{name: getattr(spec, name) for name in OF_AUTOENCODER},
        "drop_path_rate": spec.drop_path,
    }


def classifier_arguments(spec: ModelSpec, image: ImageSpec, encoder: type[Encoder] | None = None) -> dict[str, Any]:
    """Returns the arguments of `VisionTransformer` and of a mix-in.

    Raises:
        ValueError: as in `encoder_arguments`.
    """
    return {
        **_shape(spec, image, encoder),
        "num_classes": spec.nb_classes or 0,
        "drop_path_rate": spec.drop_path,
        "global_pool": spec.global_pool,
    }


def timm_arguments(spec: ModelSpec, image: ImageSpec, encoder: type[Encoder] | None = None) -> dict[str, Any]:
    """Returns the arguments of `TimmEncoder`.

    Raises:
        ValueError: a setting of other models is given.
    """
    given = [
        name
        for name in ("patch_size", "qk_norm", "encoder", "encoder_args", "lora", "global_pool", "pool")
        if getattr(spec, name)
    ]
    if given or encoder:
        raise ValueError(f"`{[*given, 'encoder'][0]}` has no effect on {spec.model}, a model of timm: omit it")
    return {"name": spec.model.removeprefix(TIMM), "img_size": image.input_size, "in_chans": image.in_chans}


def segmenter_arguments(spec: ModelSpec, image: ImageSpec, encoder: type[Encoder] | None = None) -> dict[str, Any]:
    """Returns the arguments of `Segmenter` and of a mix-in."""
    arguments = classifier_arguments(spec, image, encoder)
    return {name: value for name, value in arguments.items() if name != "global_pool"} | {"head": spec.head}


def mask_sampler(spec: ModelSpec, model: MaskedAutoencoderViT) -> tuple[Callable[[], Tensor], float]:
    """Returns the masking strategy of a training, as `masking.sampler`."""
    return masking.sampler(
        spec.masking, model.grid_size, spec.mask_ratio, spec.mask_block, model.patch_embed.patch_size,
        model.scores_visible,
    )  # fmt: skip


def freeze_below(model: Encoder, num_blocks: int | str | None) -> None:
    """Freezes everything below the last `num_blocks` blocks (section 4.3, "Partial fine-tuning"), except adapters.

    Args:
        num_blocks: the number of blocks; "all"; or None: all, or 0 with adapters.

    Raises:
        ValueError: the model has fewer blocks.
    """
    if num_blocks == "all" or (num_blocks is None and not model.adapters):
        return
    depth = len(model.blocks)
    count = int(num_blocks or 0)
    if not 0 <= count <= depth:
        raise ValueError(f"unfreeze_blocks={count}: the model has {depth} blocks")
    trained = (*ABOVE_BLOCKS, *(f"blocks.{number}." for number in range(depth - count, depth)))
    for name, parameter in model.named_parameters():
        if not (name.startswith(trained) or name.endswith(model.adapters)):
            parameter.requires_grad_(False)


def warn_of_frozen(model: nn.Module, num_blocks: int | str | None) -> None:
    """Logs a warning if `freeze_below` freezes random weights. The user's code may update weights that it freezes."""
    if num_blocks not in (None, "all") or getattr(model, "adapters", False):
        logger.warning(
            "no `finetune` or `init_from`: the frozen weights below adapters and the last `unfreeze_blocks` are random"
        )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of encoder and decoder of a model, or of the models in it."""
    lists = [getattr(model, name, None) for name in ("blocks", "decoder_blocks")]
    found = [block for blocks in lists if isinstance(blocks, nn.Module) for block in blocks.children()]
    return found or [block for part in model.children() for block in blocks_of(part)]


def set_grad_checkpointing(model: nn.Module) -> set[str]:
    """Enables gradient checkpointing in all blocks of a model: the backward pass recomputes their activations.

    Returns:
        The class names of the blocks of encoder and decoder that do not support it.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.grad_checkpointing = True
    return {
        type(block).__name__
        for block in blocks_of(model)
        if not isinstance(block, Block) or type(block).forward is not Block.forward
    }


def log_sizes(model: MaskedAutoencoderViT) -> None:
    """Logs width, depth and number of parameters of encoder and decoder."""
    parts = (("encoder", model.cls_token, model.blocks), ("decoder", model.mask_token, model.decoder_blocks))
    for part, token, blocks in parts:
        count = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if name.startswith(("decoder_", "mask_token")) == (part == "decoder")
        )
        logger.info(f"{part}: {token.shape[-1]} wide, {len(blocks)} deep, {count:,} parameters")


def _set_options(model: Model, spec: ModelSpec) -> Model:
    if spec.grad_checkpointing and (others := set_grad_checkpointing(model)):
        logger.warning(
            f"`grad_checkpointing` has no effect on the blocks of class {', '.join(sorted(others))}: derive them from "
            f"models_vit.Block, and override compute instead of forward"
        )
    add_updates(model, spec)
    freeze_below(model, spec.unfreeze_blocks)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine and not isinstance(module, LayerNorm):
            module.register_forward_pre_hook(_to_type_of_weights)  # a norm of the user's code
    return model


def add_updates(model: Encoder, spec: ModelSpec) -> None:
    """Adds low-rank updates to a model, in place, if its settings have any.

    Raises:
        ValueError: there are none, and their scale is given; or as in `lora.add_updates`.
    """
    if spec.lora:
        lora.add_updates(model, spec.lora, spec.lora_alpha)
    elif spec.lora_alpha:
        raise ValueError("`lora_alpha` is the scale of the updates of `lora`, which is not given")


def _to_type_of_weights(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Converts the input of a layer norm, as `models_vit.LayerNorm` does."""
    return (inputs[0].to(norm.get_parameter("weight").dtype), *inputs[1:])


def _shape(spec: ModelSpec, image: ImageSpec, encoder: type[Encoder] | None) -> dict[str, Any]:
    """Returns the entry of SIZES, with the image size, channels and patch size of a run, and arguments of a mix-in.

    Raises:
        ValueError: the model is one of timm, or as in `encoder_arguments`.
    """
    timm_models.require_other(spec.model)
    shape: dict[str, Any] = {
        "img_size": image.input_size,
        "in_chans": image.in_chans,
        "num_cls_tokens": spec.num_cls_tokens or UNSET["num_cls_tokens"],
    }
    if spec.patch_size is not None:
        shape["patch_size"] = spec.patch_size
    if spec.layer_norm_eps:
        shape["norm_layer"] = partial(LayerNorm, eps=spec.layer_norm_eps)
    of_block = {name: getattr(spec, name) for name in BLOCK_ARGUMENTS}
    if any(of_block.values()):
        shape["block"] = partial((encoder or Encoder).block, **of_block)
    return {**SIZES[size_of(spec.model)], **shape, **encoder_arguments(spec, encoder)}
