"""Files that are either whole or not there."""

from __future__ import annotations

import datetime
import json
import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_defense.errors import UsageError

ZIP = b"PK\x03\x04"
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
    head = _head(path)
    try:
        # Opened here, since torch judges paths by their suffix too.
        with path.open("rb") as file, torch.serialization.safe_globals(_harmless()):
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        code = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        what = f"a whole {code.group(1)}, which only code could open" if code else _told(path, head)
        raise UsageError(
            f"{path} is truncated or holds more than plain tensors ({what}), and was not loaded; "
            "give a state_dict saved with torch.save, or a .safetensors file."
        ) from error


def load_content(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read a weight file by what it is, whatever its suffix says.

    Returns:
        What it holds, and what it says of itself (nothing, of files that are no safetensors).

    Raises:
        UsageError: the file is missing or damaged, or holds more than plain values.
    """
    head = _head(path)
    # Its header is JSON behind eight bytes that hold its length.
    if head[8:9] == b"{" or (path.suffix.lower() == ".safetensors" and head[:2] != ZIP[:2]):
        return load_safetensors(path)
    if head[:4] == ZIP and all(name.endswith(".npy") for name in _members(path)):
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays), {}
    return load_plain(path), {}


def _head(path: Path) -> bytes:
    if not path.exists():
        raise UsageError(f"{path} does not exist; give the path of a weight file.")
    if not path.is_file():
        raise UsageError(f"{path} is no file; give the path of a weight file.")
    with path.open("rb") as file:
        return file.read(64)


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist() or [""]
    except zipfile.BadZipFile:
        return [""]


def _told(path: Path, head: bytes) -> str:
    """Return what a file that holds no weights is instead, as far as its beginning tells."""
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself"
    if head.lstrip().lower().startswith((b"<html", b"<!doctype")):
        return "it is a web page"
    members = _members(path) if head[:4] == ZIP else []
    if any(name.endswith("constants.pkl") for name in members):
        return "it is a TorchScript program"
    inner = [name for name in members if name.endswith((".pt", ".pth", ".bin", ".ckpt"))]
    return f"it is an archive; take {inner[0]} out of it" if inner else "nothing whole"


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
    times = [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    return [*named, *numbers, *times, np.ndarray, np.dtype, Namespace, PosixPath]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a flat dict of tensors from a .safetensors file or a plain-tensor pickle.

    Raises:
        UsageError: the file is missing, truncated, or not a flat dict of tensors.
    """
    state = load_content(path)[0]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(f"{path} holds no bare state_dict: a flat dict of names to tensors.")
    return state


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a .safetensors file: its tensors, and what `save_tensors` was told about them.

    Raises:
        UsageError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    _head(path)
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
