"""Every block of code in the README and the documentation does what it says."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ebm_defense.attacks import ATTACKS, GRADIENTS, LOSSES
from ebm_defense.commands.evaluation import evaluate as evaluate_command
from ebm_defense.commands.main import COMMANDS, parse
from ebm_defense.data import DATASETS, open_data
from ebm_defense.purifiers.registry import PURIFIERS
from ebm_defense.storage.folders import shipped_folder

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
]
FENCE = re.compile(
    r"^(?P<ticks>`{3,})(?P<language>\S*)[^\n]*\n(?P<code>.*?)^(?P=ticks)\s*?$", re.M | re.S
)
FILE = re.compile(r"# ([\w-]+\.(?:py|toml))\n")
DIRECTIVE = re.compile(r"\{[\w-]+\}")
REGISTRIES: tuple[dict[str, Any], ...] = (ATTACKS, GRADIENTS, LOSSES, PURIFIERS)
"""What the documentation adds entries to."""
SHOWN = ("text", "latex", "csv")
"""What is shown and not run: output."""


class Block(NamedTuple):
    language: str
    code: str
    line: int


def blocks(page: Path, language: str | None = None) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(m["language"], m["code"], text[: m.start("code")].count("\n"))
        for m in FENCE.finditer(text)
    ]
    return [b for b in found if language in (None, b.language)]


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Work in an empty folder that holds the files that a page's blocks are said to be."""

    def write(page: Path) -> None:
        for block in blocks(page):
            if name := FILE.match(block.code):
                (tmp_path / name[1]).write_text(block.code, encoding="utf-8")

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(shipped_folder() / "fashion-mnist", tmp_path / "my-defense")
    before, registered = set(sys.modules), [(r, dict(r)) for r in REGISTRIES]
    yield write
    for registry, entries in registered:
        registry.clear()
        registry.update(entries)
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_a_block_says_its_language(page: Path) -> None:
    known = {"python", "bash", "toml", *SHOWN}
    for block in blocks(page):
        assert block.language in known or DIRECTIVE.fullmatch(block.language), block


@pytest.mark.parametrize("page", pages_with("python"), ids=by_name)
def test_a_page_s_python_runs(page: Path, beside: Callable[[Path], None], hurried: object) -> None:
    beside(page)
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks(page, "python"):
        # So that a traceback names the page's own line.
        source = compile("\n" * block.line + block.code, by_name(page), "exec", dont_inherit=True)
        exec(source, names)


@pytest.mark.parametrize("page", pages_with("toml"), ids=by_name)
def test_a_page_s_toml_is_toml(page: Path) -> None:
    for block in blocks(page, "toml"):
        tomllib.loads(block.code)


@pytest.mark.parametrize("page", pages_with("bash"), ids=by_name)
def test_a_page_s_commands_are_commands(
    page: Path,
    beside: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside(page)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    # The sample stands for the data set that it is of, which is not on every machine.
    sample = open_data("fashion-mnist-sample")
    whole = replace(DATASETS["fashion-mnist"], open=lambda *_: sample)
    monkeypatch.setitem(DATASETS, "fashion-mnist", whole)
    monkeypatch.setattr(evaluate_command, "forecast", lambda job: job.protocol)  # it takes seconds
    for block in blocks(page, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                if words := shlex.split(command, comments=True):
                    check(words)


def check(words: list[str]) -> None:
    """Check a command of the shell as far as that can be done without running it."""
    while "=" in words[0]:  # OMP_NUM_THREADS=1
        words = words[1:]
    assert words[0] in CHECKS, f"nobody knows how to check {shlex.join(words)}"
    CHECKS[words[0]](words[1:])


def check_ours(words: list[str]) -> None:
    name, *options = words
    if name in ("--help", "--version") or "--help" in options:
        return
    assert name in COMMANDS, f"there is no command {name}"
    entry = COMMANDS[name]
    module = importlib.import_module(f"ebm_defense.commands.{entry.module}")
    command = parse(getattr(module, entry.cls), name, options)
    if name == "evaluate" and not command.sweep:
        assert replace(command, dry_run=True).run() == 0


def check_module(words: list[str]) -> None:
    """Check what torchrun runs: our command line as a module."""
    at = words.index("-m")
    assert words[at + 1] == "ebm_defense.commands.main"
    check_ours(words[at + 2 :])


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        return
    script = ROOT / words[0]
    if not script.exists():
        script = Path(words[0])
    assert script.exists(), f"there is no {script}"
    if script.parent.name == "benchmarks":
        common = importlib.import_module("common")
        (kind,) = common.benchmarks_of(importlib.import_module(script.stem))
        common.parse(kind, words[1:])


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for word in words:
        assert word in targets, f"the Makefile has no target {word}"


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "ebm-defense": check_ours,
    "torchrun": check_module,
    "python": check_python,
    "make": check_make,
    "pip": lambda words: None,
    "git": lambda words: None,
    "cd": lambda words: None,
    ".ci/run": lambda words: None,
    "apt-get": lambda words: None,
}
"""How each program that a page calls is checked."""
