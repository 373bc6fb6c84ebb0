"""The command line as a whole: help, settings files, mistakes."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebm_defense.commands.main import COMMANDS
from ebm_defense.commands.options.photos import Photos


def test_help_lists_every_command(run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert all(name in out for name in COMMANDS)


POSITIONAL: dict[str, set[str]] = {
    "audit": {"defense"},
    "checkpoints": {"action", "name", "target"},
    "diagnose": {"energy"},
    "precision": {"defense"},
    "landscape": {"energy"},
    "purify": {"images"},
    "sample": {"energy"},
    "merge": {"runs"},
    "compare": {"runs"},
    "verify": {"folder"},
    "report": {"folder"},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_for_every_field(run, name: str) -> None:
    status, out, _ = run(name, "--help")
    assert status == 0
    entry = COMMANDS[name]
    command = getattr(importlib.import_module(f"ebm_defense.commands.{entry.module}"), entry.cls)
    own = set(command.__dataclass_fields__)
    if "photos" in own:  # a group of options, which stand for themselves
        own = own - {"photos"} | set(Photos.__dataclass_fields__)
    for field in own - POSITIONAL.get(name, set()):
        assert f"--{field.replace('_', '-')}" in out


def test_unknown_command_and_option_exit_with_2(run) -> None:
    status, _, err = run("evalute")
    assert status == 2
    assert "unknown command 'evalute'" in err
    assert run("evaluate", "--no-such-option", 1)[0] == 2


def test_settings_file_holds_options_and_refuses_unknown_keys(run, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('data = "nowhere"\n')
    status, _, err = run("evaluate", "--config", file)
    assert status == 2
    assert "unknown data set 'nowhere'" in err
    file.write_text("imagse = 3\n")
    status, _, err = run("evaluate", f"--config={file}")
    assert status == 2
    assert "imagse: unknown key" in err
    file.write_text('images = "many"\n')
    assert "images" in run("evaluate", "--config", file)[2]
    assert run("evaluate", "--config", tmp_path / "none.toml")[0] == 2
    assert run("evaluate", "--config")[0] == 2


def test_options_win_over_the_settings_file(run, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('data = "nowhere"\nimages = 0\n')
    assert "at least 1, not 0" in run("evaluate", "--config", file, "--data", "digits")[2]


def test_a_mistake_prints_one_sentence_and_no_traceback(tmp_path: Path) -> None:
    words = ["evaluate", "--eps", "-1"]
    done = subprocess.run(
        [sys.executable, "-m", "ebm_defense.commands.main", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ebm-defense: eps must be above 0")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_version(run) -> None:
    assert run("--version")[1].strip().count(".") == 2


def test_a_reader_that_goes_away_makes_no_traceback() -> None:
    words = [sys.executable, "-m", "ebm_defense.commands.main", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        said = run.stderr.read()
    assert said == ""
    assert run.returncode == 141


def test_a_full_disk_is_said_in_a_sentence_and_the_run_goes_on_later(
    run, tiny_defense, tmp_path: Path, monkeypatch
) -> None:
    small = ("--data", "digits", "--images", 2, "--steps", 1, "--replicates", 1)
    words = ("evaluate", "--defense", tiny_defense, *small, "--judge-replicates", 2)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        status, _, err = run(*words, "--out", tmp_path / "run")
    assert status == 1
    assert "No space left on device; the same command goes on" in err
    assert run(*words, "--out", tmp_path / "run")[0] == 0


def test_a_settings_file_may_begin_with_a_byte_order_mark(run, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('data = "nowhere"\n', encoding="utf-8-sig")
    status, _, err = run("evaluate", "--config", file)
    assert status == 2
    assert "unknown data set 'nowhere'" in err
