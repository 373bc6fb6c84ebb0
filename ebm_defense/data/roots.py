"""Where data are looked for."""

from __future__ import annotations

import os
from pathlib import Path

from ebm_defense.errors import UsageError


def data_roots(root: str | Path | None = None) -> list[Path]:
    """Return where data are looked for: `root`, $EBM_DEFENSE_DATA, the platform's cache."""
    named = [root, os.environ.get("EBM_DEFENSE_DATA")]
    return [Path(r).expanduser() for r in named if r] + [cache_folder()]


def cache_folder() -> Path:
    """Return the platform's cache folder for data and downloads."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ebm-defense"


def named_root(root: str | Path | None) -> Path | None:
    """Return the data folder that a user named, if one was.

    Raises:
        UsageError: it is no folder.
    """
    if root is None:
        return None
    folder = Path(root).expanduser()
    if folder.is_file():
        raise UsageError(f"the data folder {root} is a file; name the folder.")
    if not folder.is_dir():
        raise UsageError(f"the data folder {root} does not exist; create it or name another.")
    return folder
