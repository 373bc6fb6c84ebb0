"""`ebm-defense`: finds the command, reads its settings, runs it."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ebm_defense.errors import FailedRunError, UsageError
from ebm_defense.runtime.memory import keep_freed_memory

USAGE_STATUS = 2


class Entry(NamedTuple):
    """Where a command lives; it is imported only when it is asked for."""

    module: str
    cls: str
    summary: str


MACHINE_S = {
    getattr(errno, name, None)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EMFILE")
}
"""Failures of disks and rights, which no traceback explains."""
COMMANDS: dict[str, Entry] = {
    "evaluate": Entry(
        "evaluation.evaluate", "Evaluate", "attack a defense, judge it, print the table"
    ),
    "audit": Entry(
        "evaluation.audit", "AuditCommand", "ask whether a defense only hides its gradient"
    ),
    "attacks": Entry("evaluation.attacks", "Attacks", "list every attack by name, with its cost"),
    "rank-attacks": Entry(
        "evaluation.rank_attacks", "RankAttacks", "rank every attack on a defense"
    ),
    "corruptions": Entry(
        "evaluation.corruptions", "Corruptions", "measure a defense on common corruptions"
    ),
    "signal": Entry(
        "evaluation.signal", "SignalCommand", "show how many replicates a gradient needs"
    ),
    "merge": Entry(
        "evaluation.merge", "Merge", "put the parts of a run together that --shard made"
    ),
    "verify": Entry("evaluation.verify", "Verify", "judge a run's saved adversarial images again"),
    "compare": Entry("evaluation.compare", "Compare", "one table and figures of several runs"),
    "report": Entry("evaluation.report", "WriteReport", "one HTML page of a run"),
    "purify": Entry("purify", "Purify", "purify images and draw a film strip of it"),
    "train-ebm": Entry("training.train_ebm", "TrainEbm", "learn an energy by maximum likelihood"),
    "train-classifier": Entry(
        "training.train_classifier",
        "TrainClassifier",
        "learn a classifier, also on purified images",
    ),
    "train-defense": Entry(
        "training.train_defense",
        "TrainDefense",
        "learn a whole defense against attacks on its input",
    ),
    "train-diffusion": Entry(
        "training.train_diffusion", "TrainDiffusion", "learn a diffusion model to purify with"
    ),
    "train-latent": Entry(
        "training.train_latent",
        "TrainLatent",
        "learn a generator, its encoder and an energy to purify with",
    ),
    "train-advgan": Entry(
        "training.train_advgan", "TrainAdvgan", "train a generator of attacks, AdvGAN"
    ),
    "sample": Entry("sample", "Sample", "draw images from an energy, reconstruct, interpolate"),
    "diagnose": Entry("diagnose", "Diagnose", "say whether an energy's chains converge"),
    "landscape": Entry("landscape", "LandscapeCommand", "map an energy's basins and barriers"),
    "assemble": Entry(
        "training.assemble", "Assemble", "put trained parts together into a defense folder"
    ),
    "bench": Entry("machine.bench", "Bench", "measure Langevin steps a second on this machine"),
    "doctor": Entry(
        "machine.doctor", "Doctor", "say what this machine has, and check what it computes"
    ),
    "precision": Entry(
        "machine.precision", "Precision", "check bf16 on a defense, and keep the finding"
    ),
    "checkpoints": Entry("checkpoints", "Checkpoints", "list, verify and import defenses"),
}


def usage() -> str:
    """Return what `ebm-defense --help` prints."""
    lines = [f"  {name:<17} {entry.summary}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ebm-defense COMMAND [OPTIONS]",
            "",
            "Long-run MCMC purification in front of any image classifier, and the honest measure",
            "of its robustness.",
            "",
            "commands:",
            *lines,
            "",
            "ebm-defense COMMAND --help lists a command's options; --config FILE.toml holds them.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 for a user's mistake, 1 for a run that failed, 130 if stopped.

    141 says that nobody reads on, as under `ebm-defense … | head`.
    """
    try:
        status = _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # What python still wants to flush on its way out has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0
    if given[0] == "--version":
        from ebm_defense import __version__

        print(__version__)
        return 0
    keep_freed_memory()
    try:
        with _terminable(), _told():
            return _run(given[0], given[1:])
    except UsageError as error:
        return _say(error, USAGE_STATUS)
    except FailedRunError as error:
        return _say(error, 1)
    except KeyboardInterrupt:
        return _say("stopped; the same command goes on from the last finished part.", 130)


@contextmanager
def _told() -> Iterator[None]:
    """Say in a sentence that a disk is full, or what else is the machine's affair.

    Raises:
        FailedRunError: in place of such an `OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in MACHINE_S:
            raise
        what = f" ({error.filename})" if error.filename else ""
        raise FailedRunError(
            f"{error.strerror}{what}; the same command goes on once that is mended."
        ) from error


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM, which torchrun and batch systems send, end a run as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may ask for signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(name: str, rest: list[str]) -> int:
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}.")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ebm_defense.precision").setLevel(logging.INFO)
    entry = COMMANDS[name]
    command = getattr(importlib.import_module(f"ebm_defense.commands.{entry.module}"), entry.cls)
    status: int = parse(command, name, rest).run()
    return status


def parse(command: type[Any], name: str, rest: list[str]) -> Any:
    """Build a command from its options, over the values of `--config FILE` where one is given.

    A command that has recipes says by its `recipe_file` where the one of `--recipe NAME` lies.
    """
    import tyro

    rest, file = _take(rest, "--config")
    default = from_file(command, file) if file else None
    if hasattr(command, "recipe_file") and {"-h", "--help"}.isdisjoint(rest):
        rest, recipe = _take(rest, "--recipe")
        if recipe and file:
            raise UsageError("--config and --recipe each give all options; leave one of them out.")
        if recipe:
            default = from_file(command, str(command.recipe_file(recipe)))
            default = dataclasses.replace(default, recipe=recipe)
    return tyro.cli(
        command,
        prog=f"ebm-defense {name}",
        args=rest,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _take(rest: list[str], option: str) -> tuple[list[str], str | None]:
    """Take an option and its word out of the others."""
    for i, word in enumerate(rest):
        if word.startswith(f"{option}="):
            return rest[:i] + rest[i + 1 :], word.partition("=")[2]
        if word == option:
            if i + 1 == len(rest):
                raise UsageError(f"{option} needs the path of a TOML file.")
            return rest[:i] + rest[i + 2 :], rest[i + 1]
    return rest, None


def from_file(command: type[Any], path: str) -> Any:
    """Build a command from a TOML file of its options; paths that it lacks are left to be given.

    Raises:
        UsageError: the file cannot be read, or holds what is no option.
    """
    import tomllib
    from pathlib import Path

    import tyro

    from ebm_defense.storage.serialize import from_plain

    try:
        plain = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"the settings file {path} cannot be read ({error}).") from error
    plain = {k.replace("-", "_"): v for k, v in plain.items()}
    needed = [f.name for f in dataclasses.fields(command) if _is_needed(f)]
    absent = {name: tyro.MISSING for name in needed if name == "out" and name not in plain}
    found = from_plain(command, plain | dict.fromkeys(absent, ""), path)
    return dataclasses.replace(found, **absent) if absent else found


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _say(message: object, status: int) -> int:
    print(f"ebm-defense: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
