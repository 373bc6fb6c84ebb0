"""What a trainer's checkpoint is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebm_defense.errors import UsageError


def refuse_another(state: Any, now: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint that was begun with another seed or network than a trainer has.

    The generator's state goes on whatever the seed, and shapes do not tell an activation: neither
    would take effect, or both would be mixed.

    Args:
        state: the checkpoint, which says under "about" what it is of, if it is not an older one.
        now: what the trainer is of.
        path: the checkpoint's.

    Raises:
        UsageError: the first thing that differs is named.
    """
    kept = state.get("about", {}) if isinstance(state, dict) else {}
    for name, value in kept.items():
        if now.get(name, value) != value:
            raise UsageError(
                f"{path} was begun with {name} {value}, and cannot go on with {name} {now[name]}; "
                f"keep it, or begin anew."
            )
