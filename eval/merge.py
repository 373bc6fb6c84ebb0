"""Parts of one run, made on separate machines, put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.sanity_checks import load_sanity_checks, save_sanity_checks
from ebm_defense.eval.protocols.protocol import restore_protocol
from ebm_defense.eval.reporting.report import Report, report_of
from ebm_defense.eval.running.runner import SHARD, gather
from ebm_defense.eval.storage.behaviour import Answers, refuse_another
from ebm_defense.eval.storage.run_folder import (
    DATA,
    ENVIRONMENT,
    SETTINGS,
    SHARDS,
    Done,
    RunFolder,
    differences,
    kept_answers,
    load_shard,
    read_toml,
    shard_files,
)
from ebm_defense.storage.files import load_tensors


def merge(parts: Sequence[str | Path], out: str | Path) -> Report:
    """Put the folders that `--shard` made together into the folder of the whole run.

    The result holds the same records, images and tables as one uninterrupted run.

    Args:
        parts: run folders of the same settings, which hold each shard exactly once.
        out: the whole run's folder.

    Raises:
        UsageError: a folder is no run, settings differ, a shard is missing, doubled or damaged.
    """
    folders = [Path(part).expanduser() for part in parts]
    settings = _agreed_settings(folders)
    shards = _each_once(folders, settings["data"]["images"])
    protocol = restore_protocol(settings["protocol"])
    data, behaviour = load_tensors(folders[0] / DATA), _agreed_behaviour(folders)
    with RunFolder(out, settings, data, behaviour=behaviour).claimed() as whole:
        done = gather([_copy(folder, start, whole) for start, folder in shards.items()])
        sanity_checks = load_sanity_checks(folders[0])
        report = report_of(
            done, settings, protocol, data["images"], sanity_checks, answers=behaviour
        )
        if sanity_checks is not None:
            save_sanity_checks(whole.path, sanity_checks)
        report.save(whole.path)
        whole.finish(*done, parts=[_environment(folder) for folder in folders])
    return report


def _agreed_settings(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the settings that all parts share, without their own shard."""
    if not folders:
        raise UsageError("merge needs the folders of a run's parts.")
    first, *others = (_settings(folder) for folder in folders)
    for folder, settings in zip(folders[1:], others, strict=True):
        if differing := differences(first, settings):
            raise UsageError(
                f"{folder} and {folders[0]} are of different runs ({', '.join(differing)}); "
                "merge parts of one run."
            )
    return first


def _agreed_behaviour(folders: Sequence[Path]) -> Answers | None:
    """Return how the model of all parts answers, as far as they kept it."""
    known = {folder: found for folder in folders if (found := kept_answers(folder)) is not None}
    first = next(iter(known.values()), None)
    for folder, found in known.items():
        refuse_another(first or {}, found, folder)
    return first


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / SETTINGS).is_file():
        raise UsageError(f"{folder} holds no run: there is no {SETTINGS} in it.")
    settings = read_toml(folder / SETTINGS)
    return {key: value for key, value in settings.items() if key != "shard"}


def _each_once(folders: Sequence[Path], images: int) -> dict[int, Path]:
    """Return the folder of each shard, in the run's order."""
    holders = {
        start: [f for f in folders if shard_files(f / SHARDS, start)[-1].exists()]
        for start in range(0, images, SHARD)
    }
    for start, found in holders.items():
        if len(found) > 1:
            raise UsageError(f"{found[0]} and {found[1]} both hold shard {start:06d}; name one.")
    if missing := [f"{start:06d}" for start, found in holders.items() if not found]:
        raise UsageError(
            f"these folders lack shard {', '.join(missing)} of {len(holders)}; finish the part "
            "that makes it, or name its folder too."
        )
    return {start: found[0] for start, found in holders.items()}


def _copy(folder: Path, start: int, whole: RunFolder) -> Done:
    done = load_shard(folder / SHARDS, start)
    assert done is not None  # `_each_once` saw its seal
    whole.save(start, done)
    return done


def _environment(folder: Path) -> dict[str, Any]:
    file = folder / ENVIRONMENT
    return {"folder": str(folder)} | (read_toml(file) if file.exists() else {})
