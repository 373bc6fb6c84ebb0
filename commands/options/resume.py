"""Going on with a training where it stopped, and with nothing else."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ebm_defense.commands.options.shared import SETTINGS, plain
from ebm_defense.errors import UsageError

CHECKPOINT = "checkpoint.pt"


def checkpoint_of(out: Path, command: Any, fixed: Collection[str]) -> Path | None:
    """Return the checkpoint that a training in `out` goes on from; None if there is none yet.

    Args:
        out: the training's folder.
        command: the training command, with `resume` among its options.
        fixed: the options that a checkpoint already holds the outcome of, so that another value
            would do nothing, or mix two trainings.

    Raises:
        UsageError: there is one, and nobody said to go on from it; or it was begun with another
            value of a fixed option.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    if not command.resume:
        raise UsageError(f"{out} holds a checkpoint; go on with --resume, or name another folder.")
    if (out / SETTINGS).is_file():
        _refuse_changes(out, command, fixed)
    return path


def _refuse_changes(out: Path, command: Any, fixed: Collection[str]) -> None:
    try:
        begun = tomllib.loads((out / SETTINGS).read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{out / SETTINGS} is damaged ({error}); name another folder.") from error
    now = plain(command)
    usual = plain(type(command)(out=out))
    for name in sorted(fixed):
        # What is absent was not given, or is an option that a former version had not.
        before, value = begun.get(name), now.get(name)
        if value != before and not (before is None and value == usual.get(name)):
            option = f"--{name.replace('_', '-')}"
            said = f"without {option}" if before is None else f"with {option} {before}"
            raise UsageError(
                f"{out} was begun {said}, and --resume cannot change it to {value}; repeat the "
                "command as it was, or name another folder."
            )
