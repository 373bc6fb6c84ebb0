"""A finished run folder, read back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.sanity_checks import load_sanity_checks
from ebm_defense.eval.protocols.protocol import restore_protocol
from ebm_defense.eval.reporting.report import Report, report_of
from ebm_defense.eval.storage.run_folder import (
    ADVERSARIAL,
    DATA,
    ENVIRONMENT,
    RECORDS,
    SETTINGS,
    SHARDS,
    SUMS,
    Costs,
    Done,
    kept_answers,
    read_records,
    read_toml,
    total,
)
from ebm_defense.storage.files import load_tensors
from ebm_defense.storage.folders import sha256


def load_run(path: str | Path, *, name: str | None = None, kinds: Iterable[type] = ()) -> Report:
    """Read the report of a finished run from its folder.

    Args:
        path: the run folder.
        name: stands for the defense in comparisons; the folder's name if not given.
        kinds: frozen dataclasses of your own that the run's protocol holds, such as an attack.

    Raises:
        UsageError: no run, an unfinished one, a file that is missing or was changed, or a protocol
            that this version does not know.
    """
    folder = Path(path).expanduser()
    _check(folder)
    settings = read_toml(folder / SETTINGS)
    return report_of(
        Done((read_records(folder / RECORDS), load_tensors(folder / ADVERSARIAL)), _costs(folder)),
        settings,
        restore_protocol(settings["protocol"], kinds),
        load_tensors(folder / DATA)["images"],
        load_sanity_checks(folder),
        name or folder.resolve().name,
        kept_answers(folder),
    )


def _check(folder: Path) -> None:
    if not (folder / SETTINGS).is_file():
        raise UsageError(f"{folder} holds no run: there is no {SETTINGS} in it.")
    if not (folder / SUMS).is_file():
        done = len(list((folder / SHARDS).glob("*.sha256")))
        raise UsageError(
            f"the run in {folder} is not finished ({done} shards are); repeat its command, or "
            "merge its parts, first."
        )
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = folder / Path(name).name
        if not file.is_file() or sha256(file) != digest:
            raise UsageError(
                f"{file} is damaged or was changed; delete {folder / SUMS} and {file}, and repeat "
                "the run's command, which makes them again from the finished shards."
            )


def _costs(folder: Path) -> Costs:
    file = folder / ENVIRONMENT
    return total([read_toml(file).get("run", {})] if file.exists() else [])
