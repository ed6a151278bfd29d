"""The command `mae`: each of its commands is a script or a module with a command, and has its flags.

This module imports nothing of the library, so that `mae --help` takes no time.
"""

import runpy
import signal
import sys

COMMANDS = {  # by what one wants to do: module, and what it does
    "An answer about your images": {
        "start": ("mae.recommend", "from a folder of images to a page: recipe, pre-training, comparison"),
        "recipe": ("mae.data", "check images, and write a recipe for them, this machine and a time"),
        "report": ("mae.inference.report", "a page about a run: curves, verdict, reconstructions, neighbors"),
        "compare": ("main_compare", "encoders, raw pixels and training from scratch, in one table"),
    },
    "Training": {
        "pretrain": ("main_pretrain", "masked pre-training"),
        "finetune": ("main_finetune", "fine-tune an encoder, or evaluate a classifier"),
        "linprobe": ("main_linprobe", "a linear or attentive probe on frozen features"),
        "segment": ("main_segment", "semantic segmentation"),
        "submit": ("submitit_pretrain", "a pre-training as a job on Slurm; submitit_finetune and others are alike"),
    },
    "Using an encoder": {
        "knn": ("main_knn", "classify by nearest neighbors"),
        "features": ("mae.inference.features", "compute the features of images"),
        "neighbors": ("mae.inference.neighbors", "find similar images"),
        "map": ("mae.inference.image_map", "a map of images: duplicates, outliers, labels that look wrong"),
        "anomalies": ("mae.inference.anomalies", "find images with defects, from images without"),
        "predict": ("mae.inference.predict", "classify images"),
        "reconstruct": ("mae.inference.reconstruct", "mask images and reconstruct them"),
        "export": ("mae.inference.export", "write a model for timm, transformers, ONNX and others"),
    },
}


def help_text() -> str:
    """Returns the list of commands."""
    lines = ["usage: mae COMMAND [FLAGS]", "       mae COMMAND --help"]
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<13}{text}" for name, (_, text) in commands.items())]
    return "\n".join(lines)


def main() -> None:
    """Runs the command that the first argument names. The process has its exit status."""
    name, *words = sys.argv[1:] or ["--help"]
    modules = {command: module for commands in COMMANDS.values() for command, (module, _) in commands.items()}
    if name in ("-h", "--help"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback after `| head`
        print(help_text())
    elif name in modules:
        sys.argv = [f"mae {name}", *words]
        runpy.run_module(modules[name], run_name="__main__", alter_sys=True)
    else:
        from mae.suggestions import did_you_mean

        sys.exit(f"mae: error: there is no command {name}{did_you_mean(name, modules)}; mae --help lists them")


if __name__ == "__main__":
    main()
