"""Memory of the process; run in one of its own, which it changes."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from ebm_defense.runtime.memory import keep_freed_memory
print(keep_freed_memory())
def touch():
    for _ in range(20):
        torch.ones(4_000_000)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_tensors_are_reused_without_page_faults() -> None:
    printed = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    ).stdout.split()
    if printed[0] == "False":
        pytest.skip("this C library has no mallopt")
    # Twenty tensors of 16 MB are 80,000 pages when each is fetched anew.
    assert int(printed[1]) < 8_000
