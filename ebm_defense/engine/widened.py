"""An energy in the dtype of the chain's states, whatever dtype its weights have."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ebm_defense.engine.base import Energy
from ebm_defense.interface.modes import own_dtype

_copies: WeakKeyDictionary[nn.Module, tuple[Any, nn.Module]] = WeakKeyDictionary()


def widened(energy: Energy, x: Tensor) -> Energy:
    """Return the energy as one of states such as x `[b, C, H, W]`.

    Chains run in float32 at least, also of a defense in half precision. A module of other weights
    is copied, and the copy kept while the weights stay; a function gets x in its weights' dtype.
    """
    own = own_dtype(energy)
    if own in (None, x.dtype):
        return energy
    if not isinstance(energy, nn.Module):
        return lambda x: energy(x.to(own)).to(x.dtype)
    about = [
        x.dtype,
        x.device,
        *((p.data_ptr(), _version(p)) for p in energy.state_dict().values()),
    ]
    kept, made = _copies.get(energy, (None, energy))
    if kept != about:
        made = copy.deepcopy(energy).to(x.dtype)
        _copies[energy] = (about, made)
    return made


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
