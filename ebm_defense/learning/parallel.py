"""Several processes that learn one set of weights, each on its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from ebm_defense.errors import UsageError


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

    def refuse_uneven(self, batch: int, parts: int = 1) -> None:
        """Refuse a batch that the processes cannot share evenly, or whose share has fewer images
        than parts.

        Raises:
            UsageError: the sentence names the numbers.
        """
        if batch % self.world or batch // self.world < parts:
            raise UsageError(
                f"a batch of {batch} images cannot be shared evenly by {self.world} processes in "
                f"{parts} parts each; choose a multiple of {self.world * parts}."
            )

    def places(self, count: int) -> tuple[int, ...]:
        """Return which of so many places are this process's."""
        return tuple(range(self.rank, count, self.world))

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's rows of a batch."""
        return rows[self.rank :: self.world]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over processes, all of them in one exchange."""
        each = list(tensors) if self.world > 1 else []
        if not each:
            return
        together = torch.cat([tensor.detach().flatten() for tensor in each])
        torch.distributed.all_reduce(together)
        for tensor, mean in zip(each, together.split([t.numel() for t in each]), strict=True):
            tensor.copy_(mean.div_(self.world).view_as(tensor))

    def mean(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Return the means of the processes' values."""
        if self.world == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=device)
        self.average([found])
        return found.tolist()

    def largest(self, value: float, device: torch.device) -> float:
        """Return the largest of the processes' values."""
        if self.world == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return float(found)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Put the processes' shares of `count` rows together again, in every process."""
        if self.world == 1:
            return rows
        shares = [rows.new_empty(0)] * self.world
        torch.distributed.all_gather_object(shares, rows)
        whole = rows.new_empty(count, *rows.shape[1:])
        for rank, share in enumerate(shares):
            whole[rank :: self.world] = share
        return whole

    def average_buffers(self, module: nn.Module) -> None:
        """Replace batch statistics by their mean over processes."""
        self.average(b for b in module.buffers() if b.is_floating_point())

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.world > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Part from the other processes."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
