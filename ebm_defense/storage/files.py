"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_defense.errors import UsageError

ABOUT = "ebm_defense"
"""The entry of a .safetensors file's metadata under which tensors say what they are of."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move it there once the block has succeeded."""
    # The suffix stays last: writers such as matplotlib choose a format by it.
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Put a file on the disk, so that after a power cut its name does not stand for nothing."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def writable_folder(path: str | Path) -> Path:
    """Make the folder if need be and return it; a `UsageError` if it cannot hold files."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # machines that share the folder may share process numbers
    except OSError as error:
        raise UsageError(
            f"the folder {folder} cannot be written ({error.strerror}); name another."
        ) from error
    return folder


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically, for `load_plain`."""
    with atomic(path) as partial:
        torch.save(state, partial)


def load_plain(path: Path, device: str | torch.device = "cpu") -> Any:
    """Unpickle tensors and plain values only: the one place where a pickle is opened.

    Raises:
        UsageError: the file is missing, truncated, or holds anything but tensors, numbers (NumPy's
            too), strings and their containers.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give the path of a weight file.")
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        code = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        what = f"a whole {code.group(1)}, which only code could open" if code else "nothing whole"
        raise UsageError(
            f"{path} is truncated or holds more than plain tensors ({what}), and was not loaded; "
            "give a state_dict saved with torch.save, or a .safetensors file."
        ) from error


def _harmless() -> list[Any]:
    """Return what checkpoints hold beside tensors, and what runs nothing when it is unpickled."""
    from numpy._core import multiarray

    numbers = [getattr(np.dtypes, n) for n in dir(np.dtypes) if n.endswith("DType")]
    makers = [getattr(multiarray, name) for name in ("scalar", "_reconstruct")]
    # NumPy 1 pickled under another name than NumPy 2, and either is read here.
    named = [
        (make, f"numpy.{core}.multiarray.{make.__name__}")
        for make in makers
        for core in ("core", "_core")
    ]
    return [*named, *numbers, np.ndarray, np.dtype, Namespace, PosixPath]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a flat dict of tensors from a .safetensors file or a plain-tensor pickle.

    Raises:
        UsageError: the file is missing, truncated, or not a flat dict of tensors.
    """
    if path.suffix == ".safetensors":
        return load_safetensors(path)[0]
    state = load_plain(path)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(f"{path} holds no bare state_dict: a flat dict of names to tensors.")
    return state


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a .safetensors file: its tensors, and what `save_tensors` was told about them.

    Raises:
        UsageError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"{path} does not exist; give the path of a weight file.")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is truncated or no safetensors file ({error}).") from error


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> None:
    """Write a state_dict as safetensors, atomically, with what it needs to be read aright."""
    from safetensors.torch import save

    said = None if about is None else {ABOUT: json.dumps(about)}
    packed = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, said)
    with atomic(path) as partial:
        partial.write_bytes(packed)
