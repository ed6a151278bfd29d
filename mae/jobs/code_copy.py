"""A snapshot of the code for a job. Later changes of the code do not affect a queued job."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, config: str | None) -> tuple[Path, Path | None]:
    """Copies the code of this project and a recipe to a folder that is named by the digest of their content.

    Args:
        folder: the parent folder of the copy. An existing copy with the same content is reused.
        config: path of the recipe (None: without a recipe).

    Returns:
        The folder of the copy, and the path of the recipe in it.
    """
    files = {path.relative_to(ROOT): path.read_bytes() for path in _project()}
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
        except OSError:  # another submission has created it in the meantime
            shutil.rmtree(making)
    return copy, copy / recipe if config else None


def _project() -> list[Path]:
    """Returns the files of this project: those of the clone, or those that pip installed beside other packages."""
    installed = next(ROOT.glob("masked_autoencoders-*.dist-info"), None)
    if installed is None:
        return list(_source_files(ROOT))
    files = Distribution.at(installed).files or []
    return [ROOT / file for file in files if _is_source(Path(file))]


def _is_source(file: Path) -> bool:
    return file.suffix in (".py", ".yaml") or file.match("recipes/*.txt")


def _source_files(folder: Path) -> Iterator[Path]:
    """Yields the source files of a folder, and of subfolders that directly contain Python or YAML files."""
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and _is_source(entry):
            yield entry
        elif entry.is_dir() and not entry.name.startswith((".", "_")):
            around = folder.resolve().is_relative_to(entry.resolve())  # a link upwards
            if not around and any(file.suffix in (".py", ".yaml") for file in entry.iterdir()):
                yield from _source_files(entry)
