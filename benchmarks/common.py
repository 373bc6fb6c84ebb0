"""What the benchmarks share: options, tables, and result files that say where they come from.

A benchmark is a frozen dataclass of options, whose docstring is its help, and whose `run` returns a
`Result`. `main` parses the options, prints the result, and keeps it in benchmarks/results, unless a
larger run is kept there; then, as in any case, it lies in the folder OUT.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import tyro

from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.statistics import Share
from ebm_defense.eval.reporting.renderers import RENDERERS
from ebm_defense.eval.reporting.table import interval, percent, plain_table
from ebm_defense.eval.storage.settings import environment
from ebm_defense.runtime.memory import keep_freed_memory
from ebm_defense.storage.files import writable_folder, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIZE = re.compile(r"<!-- size: (\d+) -->")


class Result(NamedTuple):
    """What a benchmark found.

    Attributes:
        name: of its file, without ".md".
        text: tables and captions, in Markdown.
        size: how much was measured, as images times rows: a smaller run overwrites no larger one.
    """

    name: str
    text: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark takes."""

    out: Path = Path("runs/benchmarks")
    """Folder for what is kept on the way, and for the result."""
    results: Path = RESULTS
    """Folder of the results that are kept in the repository."""
    seed: int = 0
    """Seed of every stream."""

    def run(self) -> Result:
        """Measure."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class OnImages(Options):
    """What a benchmark of one defense on images takes."""

    defense: str = "fashion-mnist"
    """A shipped defense or a folder."""
    data: str = "fashion-mnist"
    """Data set."""
    split: str = "test"
    """train, val or test."""
    images: int = 64
    """How many images, a stratified sample."""


B = TypeVar("B", bound=Options)


def parse(benchmark: type[B], words: Sequence[str]) -> B:
    """Build a benchmark from its options."""
    options: B = tyro.cli(
        benchmark,
        prog=f"python {_script()}",
        args=list(words),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return options


def benchmarks_of(script: ModuleType) -> list[type[Options]]:
    """Return the benchmarks that a script defines."""
    kinds = (kind for kind in vars(script).values() if isinstance(kind, type))
    return [k for k in kinds if issubclass(k, Options) and k.__module__ == script.__name__]


def main(benchmark: type[Options], words: Sequence[str] | None = None) -> int:
    """Run a benchmark from the command line; return 2 for a user's mistake."""
    given = list(sys.argv[1:] if words is None else words)
    try:
        options = parse(benchmark, given)
        keep_freed_memory()
        writable_folder(options.out)
        keep(options.run(), options, command(given))
    except UsageError as error:
        print(f"{_script()}: {error}", file=sys.stderr)
        return 2
    return 0


def command(words: Sequence[str]) -> str:
    """Return the command that was given, as one types it in the repository's root."""
    return shlex.join(["python", _script(), *words])


def _script() -> str:
    script = Path(sys.argv[0]).resolve()
    return str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name


def keep(result: Result, options: Options, made_by: str) -> Path:
    """Print a result, write it to OUT, and to the repository's results if it is no smaller."""
    text = f"{result.text}\n\n{provenance(made_by)}\n\n<!-- size: {result.size} -->\n"
    print(f"\n{text}")
    write_text(options.out / f"{result.name}.md", text)
    file = writable_folder(options.results) / f"{result.name}.md"
    if result.size < size_of(file):
        print(f"{file} holds a larger run and stays; this one is in {options.out}.")
        return options.out / file.name
    write_text(file, text)
    return file


def size_of(file: Path) -> int:
    """Return how much a result file's run measured; 0 if there is none."""
    found = SIZE.search(file.read_text(encoding="utf-8")) if file.exists() else None
    return int(found[1]) if found else 0


def provenance(made_by: str) -> str:
    """Say by which command, at which commit, when and where a result was made."""
    where = environment()
    gpu = "" if where["gpu"] == "none" else f", {where['gpu']}"
    threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
    return (
        f"`{made_by}`, commit {commit()}, {date.today().isoformat()}, {where['processor']}, "
        f"{threads}{gpu}, torch {where['packages']['torch']}."
    )


def commit() -> str:
    """Return the commit of this checkout, and whether it has changes; "unknown" outside of one."""
    found = _git("rev-parse", "--short", "HEAD")
    if not found:
        return "unknown"
    return f"{found} with changes" if _git("status", "--porcelain", "-uno") else found


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as a table in Markdown, each printed as soon as it is there."""
    shown = []
    for row in rows:
        shown.append(row)
        print(*row.values(), sep=" | ", flush=True)
    return RENDERERS["markdown"](plain_table(pd.DataFrame(shown))).rstrip("\n")


def accuracy(found: Share, title: str = "robust %") -> dict[str, str]:
    """Return the columns of an accuracy: itself, its interval, and of how many images."""
    return {
        title: percent(found.value),
        "95% interval": interval(found),
        "images": f"{found.total:,}",
    }
