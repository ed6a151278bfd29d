"""A copy of this project's code, which later changes don't reach: what a job runs that waits in a queue."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, config: str | None) -> tuple[Path, Path | None]:
    """Copies the code of this project, and a recipe that may lie elsewhere, to a folder named after their content.

    Args:
        folder: gets the copy, if there is none of the same content yet.
        config: the recipe.

    Returns:
        The copy's folder, and the recipe in it.
    """
    files = {path.relative_to(ROOT): path.read_bytes() for path in _sources(ROOT)}
    recipe = Path("submitted.yaml")
    if config:
        files[recipe] = Path(config).read_bytes()
    digest = hashlib.sha256()
    for path, content in sorted(files.items()):
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    copy = folder / digest.hexdigest()[:16]
    if not copy.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=folder))
        making.chmod(0o755)
        for path, content in files.items():
            (making / path).parent.mkdir(parents=True, exist_ok=True)
            (making / path).write_bytes(content)
        try:
            making.rename(copy)
        except OSError:  # another submission has made it meanwhile
            shutil.rmtree(making)
    return copy, copy / recipe if config else None


def _sources(folder: Path) -> Iterator[Path]:
    """Python and YAML files of a folder, and of those in it that hold any: not of data, results, environments."""
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and entry.suffix in (".py", ".yaml"):
            yield entry
        elif entry.is_dir() and not entry.name.startswith((".", "_")):
            around = folder.resolve().is_relative_to(entry.resolve())  # a link upwards
            if not around and any(file.suffix in (".py", ".yaml") for file in entry.iterdir()):
                yield from _sources(entry)
