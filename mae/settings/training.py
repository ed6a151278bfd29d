"""Settings of optimization, evaluation, and of the machine and the files of a run."""

# fmt: off
from dataclasses import dataclass

from mae.files import recipes
from mae.settings.choices import AMP_CHOICES, BACKENDS, SUITES, TF32
from mae.settings.fields import FIXED, FREE, MACHINE, OPTIM, TRAINING, Values, fact, setting
from mae.settings.types import count, non_negative, path, positive, positive_int, ratio


@dataclass(frozen=True)
class OptimSpec(Values, group="optimization", role=OPTIM):
    """Length and optimization of a training."""

    epochs: int = setting(400, positive_int, metavar="N", help="number of epochs")
    # the effective batch size must be the same
    batch_size: int = setting(64, positive_int, resumed=FREE, metavar="N",
        help="batch size per process (GPU)")
    accum_iter: int = setting(1, positive_int, resumed=FREE, metavar="N",
        help="iterations per update (optimizer step). Effective batch size = batch_size x accum_iter x processes. The "
        "batch norm of probes and of segmentation normalizes each iteration of each process")
    lr: float | None = setting(None, non_negative, metavar="LR")  # None: computed from blr
    blr: float | list[float] | None = setting(1e-3, non_negative, metavar="LR",
        help="base learning rate: lr = blr x effective batch size / 256")
    min_lr: float = setting(0.0, non_negative, metavar="LR", help="learning rate at the end of the decay")
    warmup_epochs: float = setting(40, non_negative, metavar="N", help="epochs of linear warm-up, then the decay")
    # None: a cosine
    poly_power: float | None = setting(None, positive, metavar="P",
        help="power of the polynomial decay: the rate is proportional to (1 - progress)^P")
    weight_decay: float = setting(0.05, non_negative, metavar="W",
        help="weight decay; biases and other one-dimensional parameters have none")
    layer_decay: float = setting(0.75, positive, metavar="D",
        help="layer-wise learning rate decay: the factor from each layer to the layer below")
    smoothing: float = setting(0.1, ratio, metavar="S", help="label smoothing")
    clip_grad: float | None = setting(None, positive, metavar="NORM",
        help="clip the gradient to this norm (default: no clipping)")
    # None: the default of the registry
    optimizer: str | None = setting(None, role=TRAINING, resumed=FIXED, metavar="NAME",
        help="{choices}; or your own, MODULE:FUNCTION: function(model, groups) returns it for groups of parameters. "
        "Files record its name, and do not import it (default: {default})")
    lr_schedule: str | None = setting(None, role=TRAINING, resumed=FIXED, metavar="NAME",
        help="decay of the learning rate after the warm-up: {choices}; or your own, MODULE:FUNCTION: "
        "function(progress) returns the factor of the rate for the progress after the warm-up, 0 to 1. Files record "
        "its name, and do not import it (default: {default})")
    loss: str | None = fact(None, role=TRAINING)  # name of the user's function. Argument of main_finetune.main
    class_weight: str | None = setting(None, role=TRAINING, choices=["balanced"],
        help="balanced: the loss of an image is divided by the share of its class in the training set, so that small "
        "and large classes count equally (default: all images count equally)")
    on_nonfinite: str = setting("abort", role=TRAINING, choices=("abort", "skip"),
        help="if a loss or gradient is not finite: abort after saving a checkpoint, or skip the update")
    updates_per_epoch: int | None = setting(None, positive_int, role=TRAINING, metavar="N",
        help="number of updates per epoch; the next epoch continues where this one ended, and the data are "
        "reshuffled after each pass (default: one pass)")


@dataclass(frozen=True)
class EvaluationSpec(Values, group="evaluation", role=TRAINING):
    """What is evaluated, and when."""

    # None: top-1 accuracy
    metric: list[str] | None = setting(None, resumed=FIXED, action="extend", nargs="+", metavar="NAME")
    eval_every: int = setting(1, positive_int, metavar="N", help="evaluate every N epochs, and after the last one")
    vis_every: int = setting(20, count, resumed=FREE, metavar="N",
        help="log reconstructions to TensorBoard every N epochs; 0: never")
    probe_every: int = setting(0, count, resumed=FREE, metavar="N",
        help="every N epochs, log the loss of held-out images with fixed masks, and the k-NN accuracy, the effective "
        "rank (RankMe) and the uniformity of the class token of unmasked images; the training stays the same; 0: never")
    probe_path: str | None = setting(None, path, resumed=FREE, metavar="PATH",
        help="labelled dataset of --probe_every, with class folders in train/ and val/; val/ is held out (default: the "
        "training images, of which a tenth is classified by the others)")
    report: str | None = setting(None, resumed=FREE, metavar="DIR",
        help="folder for the scores per class and the confusion matrix (CSV and picture)")
    eval: bool = setting(False, role=MACHINE, action="store_true",
        help="evaluate the weights of --resume or --finetune on the validation set, and exit")
    suite: list[str] | None = setting(None, role=MACHINE, action="extend", nargs="+", metavar="NAME[=PATH]",
        help=f"with --eval: evaluate a classifier of ImageNet-1K on robustness test sets, any of {', '.join(SUITES)}, "
        "and print a table with the published results. PATH is the folder of the suite (default: its folder NAME in "
        "--data_path; of imagenet-real --data_path). suites.json in --output_dir has the results: the same command "
        "resumes (docs/results.md)")
    subset: int | None = setting(None, positive_int, role=MACHINE, metavar="N",
        help="with --suite: evaluate N evenly spaced images of each folder (default: all)")
    dist_eval: bool = setting(False, role=MACHINE, action="store_true",
        help="accepted but ignored: the evaluation is always distributed, and exact")
    k: list[int] = setting([10, 20, 100], positive_int, nargs="+", metavar="K", help="numbers of neighbors")
    temperature: list[float] = setting([0.07], positive, nargs="+", metavar="T",
        help="temperature T of the weight of a neighbor, exp(cosine similarity / T). Several values print a table of "
        "all combinations with --k; the best of them is optimistic, because the validation set selects it")

    def __post_init__(self) -> None:
        if self.suite and not self.eval:
            raise ValueError("`suite` evaluates a trained classifier: give `eval` too")
        if self.subset and not self.suite:
            raise ValueError("`subset` is for the images of `suite`: give `suite` too")


@dataclass(frozen=True)
class MachineSpec(Values, group="run", role=MACHINE):
    """Files, precision and processes of a run."""

    start_epoch: int = setting(0, count, metavar="N", help="first epoch of a run that is not resumed")
    finetune: str = setting("", path, group="model", role=TRAINING, resumed=FREE, metavar="FILE|NAME",
        help="weights to start from: a checkpoint file, or a published name such as mae_pretrain_vit_base; "
        "for nearest neighbors and probes also timm:NAME, a model of timm (default: random weights)")
    init_from: str = setting("", path, group="model", role=TRAINING, resumed=FREE, metavar="FILE",
        help="start at epoch 0 from the weights and settings in this file (default: random weights)")
    output_dir: str = setting("./output_dir", path, metavar="DIR", help="run directory: checkpoints, log.txt")
    log_dir: str = setting("./output_dir", path, metavar="DIR",
        help="folder of TensorBoard events; --output_dir if only that is set")
    resume: str = setting("", path, metavar="FILE|auto",
        help="resume from this checkpoint, which must be the newest one if it is in --output_dir; auto: from the "
        "newest valid one in --output_dir, if any (default: start a new run)")
    save_every: int = setting(20, positive_int, role=TRAINING, resumed=FREE, metavar="N",
        help="save a checkpoint every N epochs")
    save_minutes: float = setting(15.0, non_negative, role=TRAINING, resumed=FREE, metavar="M",
        help="minutes between writes of checkpoint-last.pth, also within an epoch")
    keep_last: int | None = setting(None, positive_int, role=TRAINING, resumed=FREE, metavar="K",
        help="keep only the newest K of these checkpoints (default: all)")
    amp: str = setting("auto", role=TRAINING, choices=AMP_CHOICES,
        help="mixed precision; auto: bf16 on CUDA (fp16 on older GPUs), and for training on CPUs with AVX512-BF16 or "
        f"AMX; else off. {TF32}; bf16 and fp16 do so for the products that remain in fp32. off: fp32. A "
        "resumed run has the precision of its checkpoint")
    precision: str | None = fact(None, role=TRAINING)  # what `auto` chose at the start of the run; no flag
    compile: bool = setting(False, action="store_true",
        help="compile the model with torch.compile: higher throughput, after up to a minute of compilation")
    fsdp: bool = setting(False, group="distributed", action="store_true",
        help="shard weights, gradients and optimizer states over the processes (FSDP2)")
    device: str = setting("auto", metavar="NAME", help="cpu, cuda, cuda:N, mps, or auto: cuda, else mps, else cpu")
    config: str | None = setting(None, recipes.find, metavar="YAML",
        help="recipe: a file of `flag: value` lines, or the name of one in recipes/; flags override it")
    debug: bool = setting(False, action="store_true", help="print the traceback of an error")
    dist_backend: str = setting("auto", group="distributed", choices=BACKENDS,
        help="communication backend; auto: nccl for GPUs, else gloo")
    dist_url: str = setting("env://", group="distributed", metavar="URL", help="address at which the processes connect")
    dist_timeout: float = setting(600, positive, group="distributed", metavar="S",
        help="seconds to wait for another process before the run fails")
    dist_on_itp: bool = setting(False, group="distributed", action="store_true", help="accepted but ignored")
    world_size: int = setting(1, int, group="distributed", metavar="N",
        help="accepted but ignored: the launcher sets it")
    local_rank: int = setting(-1, int, aliases=("--local-rank",), metavar="N", group="distributed",
        help="accepted but ignored: the launcher sets it")


@dataclass(frozen=True)
class ComparisonSpec(Values, group="evaluation", role=TRAINING):
    """The settings of main_compare.py alone."""

    encoders: list[str] = setting([], required=True, nargs="+", metavar="[NAME=]ENCODER",
        help="checkpoint files, folders, published names, OWNER/NAME of the Hugging Face Hub, timm:MODEL (a model of "
        "timm with its weights, frozen), scratch (random weights in the architecture of the first file, or of "
        "--model), pixels (baselines on raw pixels: logistic regression, an RBF-SVM and k-NN on principal components; "
        "for numbers ridge regression, an RBF-SVR and k-NN). NAME is the title in the table (default: the name of the "
        "file)")
    timm_weights: list[str] = setting([], nargs="+", metavar="NAME=FILE",
        help="files with the weights of models timm:NAME of --encoders (default: downloaded)")
    protocols: list[str] = setting([], nargs="+", metavar="P")
    labels: list[str] = setting(["all"], nargs="+", metavar="N",
        help="numbers of labeled training images, equally many of each class; all: the whole training set")
    draws: list[int] | None = setting(None, positive_int, nargs="+", metavar="N",
        help="number of random subsets of each number of labels; all labels are a single one. One value, or one for "
        "each of --labels (default: as many as have 2,500 labels together, at most 10)")
    budget: list[int] = setting([50], positive_int, nargs="+", metavar="N",
        help="epochs of each fine-tuning run; one value, or one for each of --labels. It sets main_finetune.py "
        "--epochs, and main_finetune.py --warmup_epochs to a tenth of them, also with --recipes")
    recipes: list[str] = setting([], nargs="+", metavar="P=YAML",
        help="a recipe for the training of a protocol (attentive, lora, finetune), such as "
        "finetune=finetune_fashion_mnist, instead of the settings of this script. Its flags for images (crop, "
        "input_size, ...) replace those that encoders record")
    keep_checkpoints: bool = setting(False, group="run", action="switch", help="keep the checkpoints of completed runs")
