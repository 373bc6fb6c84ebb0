"""Chains as CUDA graphs: captured once, replayed for every later chain of the same shape.

At the published 150 chains a GPU step is bound by the launches of its kernels, which a graph
replaces by one. A graph computes in buffers of its own, into which a chain's states, keys, step
number and weights are written before it is replayed; so it serves other chains, other noise and
other weights. Every capture is held against single steps before it is used, to the last bit, and
what cannot be captured is run step by step instead: losing a graph costs nothing but speed.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_defense.engine.base import EnergyGradient, Mover
from ebm_defense.engine.report import fell_back
from ebm_defense.engine.trust import trusted
from ebm_defense.noise import KeyedNoise, Noise
from ebm_defense.runtime.memory import is_full

SEGMENT, WARM_UP = 20, 3
"""Steps of the longer graph; steps taken singly before a capture, in which libraries choose their
kernels."""
PAYS = 500
"""Steps of one shape after which a capture, with its proof, has paid for itself; until as many were
asked for they are taken singly."""
KEPT = 16
"""How many captures are kept, the latest used."""


class Kind(NamedTuple):
    """What a capture is made for; whatever else differs is written into its buffers."""

    device: torch.device
    shape: torch.Size
    dtype: torch.dtype
    mover: Hashable
    gradient: Hashable


class Pool:
    """Memory that the captures of a device share, since never two of them run at once.

    Attributes:
        handle: torch's.
        used: when the last replay in it ends; None before the first.
    """

    def __init__(self) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()
        self.used: torch.cuda.Event | None = None


class Captured:
    """Graphs of one step and of `SEGMENT` steps, over buffers of their own.

    Args:
        x: states like those of the chains, `[b, C, H, W]`.
        noise: of them.
        gradient: ∇U, of which a copy is kept.
        mover: what moves the states.
        pool: of its device.

    Raises:
        RuntimeError: the capture failed, or its replay is not the single steps.
    """

    def __init__(
        self, x: Tensor, noise: KeyedNoise, gradient: EnergyGradient, mover: Mover, pool: Pool
    ) -> None:
        self.x = x.clone(memory_format=torch.contiguous_format)
        self.keys = noise.keys.clone()
        self.number = torch.zeros(1, dtype=torch.int64, device=x.device)
        # A copy, since the weights that it reads may be the network's own.
        self.gradient, self.mover, self.pool = copy.deepcopy(gradient), mover, pool
        # One of this device's: torch's own is made once a process, on whichever device was current.
        self.stream = torch.cuda.Stream(x.device)
        # The chain whose weights the buffers hold: it may come for a piece at a time.
        self.given = weakref.ref(gradient)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._capture(x)

    def run(self, x: Tensor, keys: Tensor, steps: range, gradient: EnergyGradient) -> Tensor:
        """Return the states that these steps lead to from x; they are the caller's only until the
        next call.

        Raises:
            RuntimeError: the steps were not taken.
        """
        if self.pool.used is not None:  # on whichever stream
            torch.cuda.current_stream(x.device).wait_event(self.pool.used)
        self._write(x, keys, steps.start)
        if self.given() is not gradient:
            for own, new in zip(self.gradient.reads, gradient.reads, strict=True):
                own.copy_(new)
            self.given = weakref.ref(gradient)
        self._replay(len(steps))
        # Asking makes the host wait, which short runs, as of gradients through chains, must not.
        if len(steps) >= SEGMENT and int(self.number) != steps.stop:
            raise RuntimeError("the replay did not take its steps")
        return self.x

    def free(self) -> None:
        """Give the graphs' memory back."""
        for graph in self.graphs.values():
            graph.reset()
        self.graphs = {}

    def _replay(self, steps: int) -> None:
        for _ in range(steps // SEGMENT):
            self.graphs[SEGMENT].replay()
        for _ in range(steps % SEGMENT):
            self.graphs[1].replay()
        self.pool.used = torch.cuda.current_stream(self.x.device).record_event()

    def _write(self, x: Tensor, keys: Tensor, first: int) -> None:
        self.x.copy_(x)
        self.keys.copy_(keys)
        self.number.fill_(first)

    def _take(self, count: int) -> None:
        for ahead in range(count):
            self.mover.draw(self.x, self.gradient(self.x), self.keys, self.number, ahead)
        self.number.add_(count)

    def _capture(self, x: Tensor) -> None:
        current = torch.cuda.current_stream(x.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self._take(WARM_UP)
            self._take(SEGMENT)
        current.wait_stream(self.stream)
        expected = self.x.clone()
        self.graphs = {count: self._graph(count) for count in (SEGMENT, 1)}
        self._write(x, self.keys, 0)
        self._replay(SEGMENT + WARM_UP)
        # Chains that diverged are as equal as others.
        if int(self.number) != SEGMENT + WARM_UP:
            raise RuntimeError("the replay did not take its steps")
        if not torch.equal(self.x.nan_to_num(), expected.nan_to_num()):
            raise RuntimeError("the replay is not the single steps")

    def _graph(self, count: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool.handle, stream=self.stream, capture_error_mode="thread_local"
        ):
            self._take(count)
        return graph


class Captures:
    """The captures of a process, the latest used last; what failed once is not tried again."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Kind, Captured] = OrderedDict()
        self.asked: Counter[Kind] = Counter()
        self.refused: set[Kind] = set()
        self.closed: set[torch.device] = set()
        self.pools: dict[torch.device, Pool] = {}
        # Buffers are shared; a thread that finds them in use takes its steps singly.
        self.lock = threading.Lock()

    def clear(self) -> None:
        """Give all memory back, as where memory is full."""
        for device in self.pools:
            torch.cuda.synchronize(device)
        for captured in self.kept.values():
            captured.free()
        self.kept.clear()
        self.pools.clear()

    def find(
        self, kind: Kind, x: Tensor, noise: KeyedNoise, steps: int, gradient: EnergyGradient
    ) -> Captured | None:
        """Return the capture for such chains; None as long as it would not pay, or where it failed.

        Raises:
            RuntimeError: it failed now.
        """
        if kind in self.kept:
            self.kept.move_to_end(kind)
            return self.kept[kind]
        if kind in self.refused or kind.device in self.closed:
            return None
        self.asked[kind] += steps
        if self.asked[kind] < PAYS:
            return None
        self.refused.add(kind)  # until it has been made
        pool = self.pools.setdefault(kind.device, Pool())
        self.kept[kind] = Captured(x, noise, gradient, kind.mover, pool)  # type: ignore[arg-type]
        self.refused.discard(kind)
        self._bound()
        return self.kept[kind]

    def _bound(self) -> None:
        if len(self.kept) > KEPT:
            self.kept.popitem(last=False)[1].free()
        if len(self.asked) > 100 * KEPT:
            self.asked.clear()

    def drop(self, kind: Kind, error: RuntimeError) -> None:
        """Forget a capture that failed, and where it was not for memory, capture no more there.

        A capture that failed may leave streams and allocator of its device in a state that fails
        the next one.
        """
        self.refused.add(kind)
        found = self.kept.pop(kind, None)
        if found is not None:
            found.free()
        if is_full(error):
            self.clear()
        else:
            self.closed.add(kind.device)


CAPTURES = Captures()


def run_graphed(
    x: Tensor, noise: Noise, steps: range, gradient: EnergyGradient, mover: Mover
) -> int:
    """Take all `steps` on x, in place, by replaying a graph; return how many were taken: 0 or all.

    None on a CPU, with noise that is no function of the step or not drawn where x is, of an energy
    whose kernels nobody knows, where it does not pay, or where capture failed, which leaves x as it
    was and is said once.
    """
    signature = getattr(gradient, "signature", None)
    keyed = isinstance(noise, KeyedNoise) and noise.keys.device == x.device
    if x.device.type != "cuda" or not keyed or signature is None or not len(x) or not steps:
        return 0
    assert isinstance(noise, KeyedNoise)
    if not trusted(x.device, "graphs"):
        return 0
    if not CAPTURES.lock.acquire(blocking=False):
        return 0
    try:
        kind = Kind(x.device, x.shape, x.dtype, mover, signature)  # type: ignore[arg-type]
        return _run(kind, x, noise, steps, gradient)
    finally:
        CAPTURES.lock.release()


def _run(kind: Kind, x: Tensor, noise: KeyedNoise, steps: range, gradient: EnergyGradient) -> int:
    try:
        # Buffers outlive the caller's inference_mode, in whose tensors nothing could be written.
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            captured = CAPTURES.find(kind, x, noise, len(steps), gradient)
            if captured is None:
                return 0
            moved = captured.run(x, noise.keys, steps, gradient)
    except RuntimeError as error:
        CAPTURES.drop(kind, error)
        fell_back("CUDA graphs", type(gradient).__name__, str(error).partition("\n")[0])
        return 0
    x.copy_(moved)
    return len(steps)


def free_graphs() -> None:
    """Give back the memory of all captured graphs; later chains capture anew."""
    with CAPTURES.lock:
        CAPTURES.clear()
