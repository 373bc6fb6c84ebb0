"""Several processes that learn one set of weights, each on its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn


@dataclass(frozen=True)
class Team:
    """A process's rank among the `world` that torchrun started; 0 of 1 without it."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, device: torch.device) -> Team:
        """Read torchrun's environment and join the others."""
        rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, world)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's rows of a batch."""
        return rows[self.rank :: self.world]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over processes."""
        if self.world == 1:
            return
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor.div_(self.world)

    def average_buffers(self, module: nn.Module) -> None:
        """Replace batch statistics by their mean over processes."""
        self.average(b for b in module.buffers() if b.is_floating_point())

    def leave(self) -> None:
        """Part from the other processes."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
