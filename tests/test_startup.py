"""What is not needed is not imported; run in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torchvision", "pandas", "matplotlib", "scipy", "skimage", "sklearn", "tyro", "pydantic")


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint()\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_the_package_and_all_its_names_import_nothing_heavy_but_torch() -> None:
    loaded = modules_after("from ebm_defense import *")
    assert {"torch", "ebm_defense.storage.weights", "ebm_defense.purifiers.base"} <= loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], ["no-such-command"]])
def test_what_the_command_line_says_by_itself_needs_no_torch(words: list[str]) -> None:
    loaded = modules_after(f"from ebm_defense.commands.main import main\nmain({words!r})")
    assert not loaded & {"torch", "numpy", *HEAVY}


def test_an_unknown_name_is_an_attribute_error() -> None:
    import ebm_defense

    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = ebm_defense.nonsense
    assert set(ebm_defense.__all__) <= set(dir(ebm_defense))
    assert set(ebm_defense.__all__) == set(ebm_defense._HOME)
