"""The files of recipes/: beside mae/ in a clone, and inside it where pip installed the library."""

from pathlib import Path

_LIBRARY = Path(__file__).resolve().parents[1]
FOLDER = next((f for f in (_LIBRARY / "recipes", _LIBRARY.parent / "recipes") if f.is_dir()), _LIBRARY / "recipes")


def find(text: str, suffix: str = ".yaml") -> str:
    """Returns the path of a recipe, such as `pretrain_vit_base`, if there is no file of that name; else the text.

    Args:
        text: a path, or the name of a file in recipes/ without its suffix.
    """
    recipe = FOLDER / f"{text}{suffix}"
    is_name = Path(text).name == text
    return str(recipe) if is_name and recipe.is_file() and not Path(text).is_file() else text


def names() -> list[str]:
    """Returns the names that `find` finds."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))
