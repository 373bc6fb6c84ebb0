"""TF32 is allowed or not inside, and everything is as it was told before outside."""

from __future__ import annotations

import subprocess
import sys

# Settings of the whole process, some of which cannot be undone: each is made in a fork of its own.
CODE = """
import os, sys, traceback, torch
from ebm_defense.engine.derivatives import repeatable, tf32
cuda = torch.device("cuda")
cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
new = hasattr(matmul, "fp32_precision")

def convolutions_round():
    return cudnn.conv.fp32_precision == "tf32" if new else cudnn.allow_tf32

def matrices_round():
    return matmul.fp32_precision == "tf32" if new else matmul.allow_tf32

def told():
    values = [cudnn.deterministic, cudnn.benchmark, convolutions_round(), matrices_round()]
    for read in (lambda: cudnn.allow_tf32, torch.get_float32_matmul_precision):
        try:
            values.append(read())
        except RuntimeError:
            values.append("mixed")  # torch refuses to sum up what was told in both ways
    if new:
        values += [cudnn.fp32_precision, matmul.fp32_precision, cudnn.conv.fp32_precision]
        before = torch.backends.fp32_precision
        for word in ("ieee", "tf32"):  # what follows the common setting still follows it
            torch.backends.fp32_precision = word
            values += [convolutions_round(), matrices_round()]
        torch.backends.fp32_precision = before
    return values

def check():
    before = told()
    for allowed in (True, False):
        with tf32(allowed, cuda), repeatable(cuda):
            assert convolutions_round() == matrices_round() == allowed, allowed
            assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
        assert told() == before, (told(), before)

for setting in sys.argv[1:] if new else sys.argv[1:6]:
    if not os.fork():
        try:
            exec(setting)
            check()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(setting, "obeyed" if os.wait()[1] == 0 else "FAILED")
"""

SETTINGS = [
    "pass",
    "cudnn.allow_tf32 = matmul.allow_tf32 = True",
    "cudnn.allow_tf32 = matmul.allow_tf32 = False",
    "torch.set_float32_matmul_precision('medium')",
    "cudnn.benchmark = True",
    # From here on as torch tells them since 2.9.
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'ieee'",
    "matmul.fp32_precision = 'tf32'",
    "cudnn.conv.fp32_precision = 'ieee'",
    "cudnn.fp32_precision = 'tf32'",
    "torch.set_float32_matmul_precision('high'); cudnn.conv.fp32_precision = 'ieee'",
]


def test_settings_are_obeyed_and_put_back():
    code = [sys.executable, "-c", CODE, *SETTINGS]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) >= 5
    assert all(line.endswith("obeyed") for line in lines), done.stdout + done.stderr
