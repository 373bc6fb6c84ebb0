"""Weights as people have them: nested, prefixed, or beside other things, fitted to a network.

What has one reading is loaded; of the rest the first key that does not fit is named.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebm_defense.errors import UsageError
from ebm_defense.storage.files import load_content

LOG = logging.getLogger("ebm_defense")
State = Mapping[str, Tensor]
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What DataParallel, torch.compile and FSDP put into the names of what they wrap."""
COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
"""Entries that no output depends on, which older or other tools leave out or add."""
SCALES = ("mean", "std", "mu", "sigma")
"""What layers that normalise images call their buffers."""
SHOWN, MANY = 3, 16
DEEP = 4
"""How far a state_dict is looked for in what surrounds it."""
TRIED = "as they are, without the prefixes of DataParallel and torch.compile, and as a part"


class _UnfitError(Exception):
    """Weights do not fit a network; the message says which key."""


class _AmbiguousError(_UnfitError):
    """Weights fit a network in more than one way."""


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a file's weights into a network.

    The file may hold a state_dict by itself or beside other things, at most four levels deep; where
    several of them fit, `PATH:NAME` names one. Its keys may carry the prefixes of DataParallel,
    torch.compile, FSDP or of any one module around the network, or lack those of a wrapper such as
    `normalized`, which keeps its own buffers.

    Args:
        module: takes the weights in place.
        path: a .safetensors file, a pickle of plain values, or an .npz of NumPy's.

    Raises:
        UsageError: a file that cannot be read, weights that do not fit or that say that they are
            of other settings, or several state_dicts that fit.
    """
    file, name = _split(path)
    content, said = load_content(file)
    refuse_other(module, said, str(file))
    load_into(module, content, str(file), name)


def _split(path: Path) -> tuple[Path, str | None]:
    """Return the file of `PATH:NAME`, and the name where there is one."""
    path = path.expanduser()
    before, colon, name = str(path).rpartition(":")
    if colon and not path.exists() and Path(before).exists():
        return Path(before), name
    return path, None


def load_into(module: nn.Module, content: Any, source: str, name: str | None = None) -> None:
    """Load what a weight file held into a network; see `load_weights`.

    Args:
        module: takes the weights in place.
        content: a state_dict, or what it is nested in.
        source: what errors call it.
        name: of the state_dict to take, where there are several.

    Raises:
        UsageError: as `load_weights`.
    """
    found = dict(_states(content))
    if not found:
        raise UsageError(f"{source} holds no state_dict, a dict of names to tensors.")
    if name is not None:
        found = _chosen(found, name, source)
    fits: dict[str, State] = {}
    reasons: dict[str, _UnfitError] = {}
    for key, state in found.items():
        try:
            fits[key] = fitted(module, state)
        except _UnfitError as error:
            reasons[key] = error
    if not fits:
        raise UsageError(f"{source} {_explained(found, reasons)}")
    if len(fits) > 1:
        names = ", ".join(fits)
        raise UsageError(
            f"{source} holds several weights that fit ({names}); name one as in "
            f"{source}:{next(iter(fits))}."
        )
    key, state = next(iter(fits.items()))
    module.load_state_dict(dict(state), strict=False)
    _tell_left_out(found[key], state, source)


def _chosen(found: Mapping[str, State], name: str, source: str) -> dict[str, State]:
    """Return the state_dict that a name leads to, or the part of one whose keys begin with it."""
    if name in found:
        return {name: found[name]}
    largest = max(found.values(), key=len)
    part = {k: v for k, v in largest.items() if name and k.startswith(f"{name}.")}
    if not part:
        raise UsageError(f"{source} holds no {name!r}, but {', '.join(k or '…' for k in found)}.")
    return {name: part}


def _tell_left_out(held: State, taken: State, source: str) -> None:
    """Say what of a file's weights went nowhere: a normalisation among them is missed."""
    kept = {id(value) for value in taken.values()}
    left = [k for k, v in held.items() if id(v) not in kept and not _counts(k)]
    if not left:
        return
    names = ", ".join(left[:SHOWN]) + (", …" if len(left) > SHOWN else "")
    scaled = any(k.rpartition(".")[2] in SCALES for k in left)
    hint = "; it normalises its images, which the network does not: give --mean and --std, or "
    LOG.warning(
        "%s holds more than the network has, which is left out: %s%s.",
        source, names, f"{hint}a factory that returns normalized(…)" if scaled else "",
    )  # fmt: skip


def unwrapped_state(path: Path, marks: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the largest state_dict of a file without what wraps its keys, to read shapes off it.

    Args:
        path: as in `load_weights`.
        marks: keys of which one says that nothing wraps them any longer.

    Raises:
        UsageError: a file that cannot be read, or without a state_dict.
    """
    file, name = _split(path)
    found = dict(_states(load_content(file)[0]))
    if not found or name not in (None, *found):
        raise UsageError(f"{path} holds no state_dict, a dict of names to tensors.")
    largest = found[name] if name else max(found.values(), key=len)
    state = _unwrapped(largest, {})
    while len(heads := {key.split(".")[0] for key in state}) == 1 and not {*marks} & {*state}:
        head = heads.pop() + "."
        state = {key.removeprefix(head): value for key, value in state.items()}
    return state


def _explained(found: Mapping[str, State], reasons: Mapping[str, _UnfitError]) -> str:
    """Say why nothing fits, of the largest state_dict."""
    largest = max(found, key=lambda name: len(found[name]))
    where = f"{reasons[largest]}" if not largest else f"({largest}) {reasons[largest]}"
    if isinstance(reasons[largest], _AmbiguousError):
        return f"{where}."
    return f"{where}: these are weights of another architecture (keys were tried {TRIED})."


def _states(content: Any, name: str = "", depth: int = DEEP) -> Iterator[tuple[str, State]]:
    """Yield every state_dict in what a file held, by the keys that lead to it."""
    if isinstance(content, list | tuple):
        content = {str(number): part for number, part in enumerate(content[:MANY])}
    if not isinstance(content, Mapping):
        return
    named = {k: _tensor(v) for k, v in content.items() if isinstance(k, str)}
    tensors = {k: t for k, t in named.items() if t is not None}
    if any(t.ndim for t in tensors.values()):
        yield name, tensors
    for key, value in content.items():
        if depth and isinstance(key, str):
            yield from _states(value, f"{name}.{key}" if name else key, depth - 1)


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value.copy())
    if not isinstance(value, Tensor) or value.is_meta:
        return None
    return value.to_dense() if value.layout != torch.strided else value


def fitted(module: nn.Module, state: State) -> State:
    """Return a state_dict under the names that a network's own entries have.

    Raises:
        _UnfitError: keys missing, unknown, or of another shape; the first is named.
    """
    wanted = module.state_dict()
    parameters = {name for name, _ in module.named_parameters()}
    state = _unwrapped(state, wanted)
    found: dict[str, State] = {}
    for cut in _prefixes(state):
        inner = {k[len(cut) :]: v for k, v in state.items() if k.startswith(cut)}
        for added in _prefixes(wanted):
            if cut == added and len(inner) < len(state):
                continue  # what is unknown beside the network's own names is no other network's
            renamed = {added + k: v for k, v in inner.items()}
            if _covers(renamed, wanted, parameters, added):
                found.setdefault(cut, renamed)
    if not found:
        raise _UnfitError(_difference(state, wanted, parameters))
    if len(found) > 1 and "" not in found:
        parts = ", ".join(part.rstrip(".") for part in found)
        raise _AmbiguousError(f"fits more than one way; name a part as in FILE:NAME, of {parts}")
    first = next(iter(found.values()))
    _refuse_shapes(first, wanted)
    return {k: v for k, v in first.items() if k in wanted}


def _unwrapped(state: State, wanted: State) -> dict[str, Tensor]:
    """Take wrappers out of the keys' paths, but not those that the network has itself."""
    own = {part for key in wanted for part in key.split(".")}
    out = set(WRAPPERS) - own
    renamed = {".".join(p for p in key.split(".") if p not in out): v for key, v in state.items()}
    return renamed if len(renamed) == len(state) else dict(state)


def _prefixes(state: State) -> list[str]:
    """Return "" and every prefix that some keys have, the shortest first."""
    found = {""}
    for key in state:
        parts = key.split(".")[:-1]
        found |= {".".join(parts[: i + 1]) + "." for i in range(len(parts))}
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _covers(renamed: State, wanted: State, parameters: set[str], prefix: str) -> bool:
    """Whether weights are all that a network, or all of one module in it that learns, wants."""
    needed = {k for k in wanted if k.startswith(prefix) and not _counts(k)}
    given = {k for k in renamed if not _counts(k)}
    outside = parameters - {k for k in parameters if k.startswith(prefix)}
    return bool(needed) and given == needed and not outside


def _counts(key: str) -> bool:
    return key.rpartition(".")[2] in COUNTERS


def _refuse_shapes(state: State, wanted: State) -> None:
    for key, value in state.items():
        if key in wanted and value.shape != wanted[key].shape and not _counts(key):
            raise _UnfitError(
                f"holds weights whose {key} has shape {tuple(value.shape)}, not "
                f"{tuple(wanted[key].shape)}"
            )


def _difference(state: State, wanted: State, parameters: set[str]) -> str:
    """Say which key is missing or unknown, under the prefixes that fit best."""

    def apart(cut: str, added: str) -> tuple[list[str], list[str]]:
        inner = {added + k[len(cut) :] for k in state if k.startswith(cut) and not _counts(k)}
        needed = [k for k in wanted if k.startswith(added) and not _counts(k)]
        missing = [k[len(added) :] for k in needed if k not in inner]
        outside = [k for k in state if not k.startswith(cut) and not _counts(k)]
        return missing, [*(cut + k[len(added) :] for k in sorted(inner - set(needed))), *outside]

    around = [p for p in _prefixes(wanted) if all(k.startswith(p) for k in parameters)]
    tried = [apart(cut, added) for cut in _prefixes(state) for added in around]
    missing, unknown = min(tried, key=lambda found: len(found[0]) + len(found[1]))
    if missing:
        return f"lacks {missing[0]}" + (f" and holds {unknown[0]}" if unknown else "")
    return f"holds {unknown[0]}, which the network has not"


def about(network: nn.Module, **more: Any) -> dict[str, Any]:
    """Return what a network's weights need besides themselves, for `save_tensors`.

    The network's settings (of a `ConvEnergy` channels, size, width and activation; of a
    `WideResNet` channels, classes, depth, width), and what `more` adds, such as normalisation.
    """
    settings: Any = getattr(network, "settings", None)
    given = dataclasses.is_dataclass(settings) and not isinstance(settings, type)
    known = dataclasses.asdict(settings) if given else {}
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}  # as JSON has it
    return {"network": type(network).__name__, **listed, **more}


def read_about(path: Path) -> dict[str, Any]:
    """Return what a weight file says of itself; nothing of one that was made elsewhere."""
    return load_content(path)[1]


def refuse_other(network: nn.Module, said: Mapping[str, Any], source: str) -> None:
    """Refuse weights that say that they belong to other settings than a network's.

    Raises:
        UsageError: the first setting that differs is named.
    """
    for name, value in about(network).items():
        if name in said and said[name] != value:
            raise UsageError(
                f"{source} was made for {name} {said[name]}, not {value}: these are weights of "
                "another architecture."
            )
