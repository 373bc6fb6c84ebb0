"""GPUs to pretend with: CPU tensors that call themselves cuda:N.

They refuse to be mixed with others, record and replay graphs, and, while one is recorded, refuse
what a capture refuses: whatever makes the host wait. Numbers are a CPU's; what is shown is the
logic of devices, streams and graphs, not a GPU's arithmetic.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from ebm_defense.engine import cuda_graphs, triton_kernels, trust

COUNT = 2
PLAIN = frozenset({"dim", "size", "is_contiguous", "element_size", "numel", "stride", "data_ptr",
    "is_floating_point", "is_inference", "promote_types", "_set_grad_enabled"})  # fmt: skip
"""What asks of tensors what needs no device; the greater part of all calls."""
MIXED = (
    Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_,
    torch._has_compatible_shallow_copy_type,
)  # fmt: skip
"""What takes tensors of several devices, as copies and indices do."""
WAITING = (
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.cpu,
    Tensor.nonzero, torch.nonzero, torch.equal, Tensor.equal, torch.allclose,
)  # fmt: skip
"""What makes the host wait for a device."""


class GpuTensor(Tensor):
    """A CPU tensor that calls itself cuda:N."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.number)

    @property
    def is_cuda(self) -> bool:
        return True

    def numpy(self, **_):
        raise TypeError("can't convert cuda tensor to numpy")

    def __reduce_ex__(self, protocol):
        raise NotImplementedError


def put(tensor: Tensor, number: int) -> GpuTensor:
    """Give a tensor a GPU's number."""
    if not isinstance(tensor, GpuTensor):
        with _disable_current_modes():  # what only renames a tensor is no operation to record
            tensor = tensor.as_subclass(GpuTensor)
        tensor.number = number
    return tensor


def put_all(out, number: int):
    """Give all that a function returned a GPU's number."""
    if isinstance(out, Tensor):
        return put(out, number)
    return type(out)(put_all(o, number) for o in out) if type(out) in (tuple, list) else out


def tensors_of(values) -> list[Tensor]:
    """Return the tensors among values, and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (tuple, list):
            found += tensors_of(value)
    return found


def number_of(device) -> int | None:
    """Return the number of a GPU that a device names; None for others."""
    if isinstance(device, int):
        return device
    device = torch.device(device)
    return None if device.type != "cuda" else GPU.current if device.index is None else device.index


GPU = SimpleNamespace(current=0, recording=None)


class Pretending(TorchFunctionMode):
    """Makes torch's functions believe in GPUs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in PLAIN:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        found = tensors_of((*args, *kwargs.values()))
        numbers = {t.number for t in found if isinstance(t, GpuTensor)}
        if numbers and func in WAITING and GPU.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func is Tensor.__deepcopy__:
            return self._copied(*args)
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._moved(func, *args, **kwargs)
        if kwargs.get("device") is not None:
            number = number_of(kwargs["device"])
            kwargs["device"] = "cpu"
            numbers = set() if number is None else {number}
        elif func not in MIXED:
            self._refuse_mixed(func, found, numbers)
        out = func(*args, **kwargs)
        if not numbers:
            return out
        return put_all(out, next(iter(numbers)))

    @staticmethod
    def _refuse_mixed(func, found, numbers):
        plain = any(t.ndim and not isinstance(t, GpuTensor) for t in found)
        if len(numbers) > 1 or (numbers and plain):
            raise RuntimeError(f"Expected all tensors to be on the same device, in {func}")

    @staticmethod
    def _copied(tensor, memo):
        new = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        if isinstance(tensor, GpuTensor):
            new = put(new, tensor.number)
            new.__dict__.update(copy.deepcopy(tensor.__dict__, memo))
        memo[id(tensor)] = new
        return new

    @staticmethod
    def _moved(func, tensor, *args, **kwargs):
        before = tensor.number if isinstance(tensor, GpuTensor) else None
        after, kept = before, []
        if func is not Tensor.to:
            args = ("cpu",) if func is Tensor.cpu else args or ("cuda",)
        for word in (*args, *(v for k, v in kwargs.items() if k in ("device", "other"))):
            if isinstance(word, Tensor):
                after = word.number if isinstance(word, GpuTensor) else None
                kept.append(word.dtype)
            elif isinstance(word, str | torch.device | int) and not isinstance(word, bool):
                after = number_of(word)
            else:
                kept.append(word)
        others = {k: v for k, v in kwargs.items() if k not in ("device", "other")}
        if before != after and GPU.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = tensor.to(*[w for w in kept if w is not None and not isinstance(w, bool)], **others)
        if before != after and out.data_ptr() == tensor.data_ptr():
            out = out.clone()
        if after is None:
            return out.as_subclass(Tensor) if isinstance(out, GpuTensor) else out
        return put(out, after)


class Recorder(TorchDispatchMode):
    """Writes down every operation and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, in ten seconds, at the first operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """A CUDA graph: what was recorded, done again to the same memory."""

    def __init__(self) -> None:
        self.operations = []

    def replay(self) -> None:
        GPU.replays += 1
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for func, args, kwargs, out in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        self.operations = []


@contextmanager
def capture(graph, pool=None, stream=None, capture_error_mode="global"):
    """Record on a stream, which sees only what is launched on its own device."""
    assert capture_error_mode == "thread_local"
    GPU.captures += 1
    recorder = GPU.recording = Recorder()
    try:
        with recorder:
            yield
    finally:
        GPU.recording = None
    if stream.number == GPU.current:
        graph.operations = recorder.operations


class Stream:
    """A stream of one device; nothing on it is ever late."""

    def __init__(self, device=None) -> None:
        self.number = GPU.current if device is None else number_of(device)

    def wait_stream(self, other) -> None: ...
    def wait_event(self, event) -> None:
        GPU.waited.append(event)

    def record_event(self):
        GPU.recorded = object()
        return GPU.recorded


@contextmanager
def on_device(device):
    before, number = GPU.current, number_of(device)
    assert number < COUNT
    GPU.current = number
    try:
        yield
    finally:
        GPU.current = before


@contextmanager
def on_stream(stream):
    with on_device(torch.device("cuda", stream.number)):
        yield


def fake_cuda() -> dict[str, object]:
    """Return by name what stands in for torch.cuda."""
    return {
        "is_available": lambda: True,
        "device_count": lambda: COUNT,
        "current_device": lambda: GPU.current,
        "set_device": lambda device: setattr(GPU, "current", number_of(device)),
        "device": on_device,
        "Stream": Stream,
        "stream": on_stream,
        "current_stream": lambda device=None: Stream(device),
        "Event": object,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": object,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "Pretend 9000",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: GPU.peak,
        "mem_get_info": lambda device=None: (GPU.free, 2 * GPU.free),
    }


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two GPUs to pretend with; what they counted is in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in fake_cuda().items():
        monkeypatch.setattr(torch.cuda, name, value)
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    plain = {"cuda": "cpu"}
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: autocast(plain.get(kind, kind), *a, **k)
    )
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind="cuda": enabled(plain.get(kind, kind))
    )
    monkeypatch.setattr(cuda_graphs, "CAPTURES", cuda_graphs.Captures())
    monkeypatch.setattr(triton_kernels, "works", lambda device: False)
    monkeypatch.setattr(triton_kernels, "VERSION", "none")
    monkeypatch.setattr(trust, "_failed", lambda device: frozenset())
    GPU.__dict__.update(
        current=0, recording=None, replays=0, captures=0, waited=[], peak=2**20, free=2**30
    )
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Pretending():
        yield GPU
    torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
