"""Names of the checkpoints in a run directory."""

from pathlib import Path

PREFIX = "checkpoint-"  # of files, and of folders of sharded runs
LAST, BEST, EMERGENCY = f"{PREFIX}last.pth", f"{PREFIX}best.pth", f"{PREFIX}emergency.pth"
STATE = "state.pth"  # in the folder of a sharded checkpoint


def checkpoints(folder: Path) -> list[Path]:
    """Lists the checkpoints in a run directory: files, and folders of sharded runs."""
    paths = [*folder.glob(PREFIX + "*.pth"), *(p.parent for p in folder.glob(f"{PREFIX}*/{STATE}"))]
    return sorted([*paths, *(p.parent for p in folder.glob(f".{PREFIX}*.old/{STATE}"))])  # left by a crash


def milestone(epoch: int) -> str:
    """Returns the file name of the state after an epoch."""
    return f"{PREFIX}{epoch}.pth"


def milestones(folder: Path) -> list[Path]:
    """Lists the milestones of a run, oldest first."""
    numbers = ((path.stem.removeprefix(PREFIX), path) for path in checkpoints(folder))
    return [path for _, path in sorted((int(number), path) for number, path in numbers if number.isdecimal())]
