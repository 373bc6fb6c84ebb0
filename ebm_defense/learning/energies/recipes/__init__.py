"""Recipes by name: TOML files of `train-ebm`'s options, to be read, copied and changed."""

from __future__ import annotations

from pathlib import Path

from ebm_defense.errors import UsageError
from ebm_defense.storage.folders import shipped_folder

HERE = Path(__file__).parent
SHIPPED = "recipe.toml"


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def recipe_file(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: one of `recipe_names`, an energy that ships with its recipe, or a TOML file.

    Raises:
        UsageError: no such recipe.
    """
    places = (HERE / f"{name}.toml", Path(name).expanduser(), shipped_folder() / name / SHIPPED)
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UsageError(
            f"there is no recipe {name!r}; choose one of {', '.join(recipe_names())}, or give a "
            "TOML file of options."
        )
    return found
