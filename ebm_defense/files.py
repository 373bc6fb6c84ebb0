"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_defense.errors import UsageError


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
        UsageError: the file is missing, truncated, or holds anything but tensors, numbers,
            strings and their containers.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give the path of a weight file.")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        raise UsageError(
            f"{path} is truncated or holds more than plain tensors, and was not loaded; "
            "give a state_dict saved with torch.save, or a .safetensors file."
        ) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state_dict from a .safetensors file or a plain-tensor pickle.

    Raises:
        UsageError: the file is missing, truncated, or not a flat dict of tensors.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    state = load_plain(path)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(f"{path} holds no bare state_dict: a flat dict of names to tensors.")
    return state


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"{path} does not exist; give the path of a weight file.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is truncated or no safetensors file ({error}).") from error


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a state_dict as safetensors, atomically."""
    from safetensors.torch import save

    packed = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    with atomic(path) as partial:
        partial.write_bytes(packed)
