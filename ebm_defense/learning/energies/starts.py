"""Where the negative chains of learning begin: one small object each.

The start decides how long a chain lives, and with it what is learned: a generator by short chains,
a defense by chains as long as its own, a density by chains that are never renewed (Nijkamp et al.
2019; Hill et al. 2022).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ebm_defense.learning.draws import Batch
from ebm_defense.learning.parallel import Team

State = dict[str, Any]
_DRAWN_AT_ONCE = 500
"""How many of a bank's first states are drawn at a time, for the sake of memory."""


class Start(Protocol):
    """Where the chains of a batch begin, and what becomes of their ends."""

    def draw(self, batch: Batch) -> Tensor:
        """Return the states `[b or more, C, H, W]` in [-1, 1] that this update's chains start from.

        The first b are the negatives of the batch; chains beyond them are only run on.
        """
        ...

    def keep(self, batch: Batch, ends: Tensor) -> None:
        """Take up where the chains of `draw` ended, once the update counts."""
        ...

    def visits(self) -> float:
        """Return how many updates a chain takes part in on average; it lives K times as many steps.

        Infinite for chains that are never renewed.
        """
        ...

    def state(self) -> State:
        """Return everything that the start must know to go on, the whole team's."""
        ...

    def restore(self, state: State) -> None:
        """Go on from a `state`, of a team of any size.

        Raises:
            ValueError: one of another start.
        """
        ...


class Fresh:
    """A start without memory: every chain lives for one update."""

    def draw(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def keep(self, batch: Batch, ends: Tensor) -> None:
        """Forget them."""

    def visits(self) -> float:
        return 1.0

    def state(self) -> State:
        return {}

    def restore(self, state: State) -> None:
        """Need nothing."""


class FromNoise(Fresh):
    """Uniform pixels in [-1, 1] (Nijkamp et al. 2019, short-run)."""

    def draw(self, batch: Batch) -> Tensor:
        return batch.draws.uniform("noise start", batch.images) * 2.0 - 1.0


class FromData(Fresh):
    """Training images with noise, others than the batch's own.

    Args:
        images: training images `[N, C, H, W]` in [-1, 1].
        spread: standard deviation of the noise, in [-1, 1] units.
    """

    def __init__(self, images: Tensor, spread: float) -> None:
        self.images, self.spread = images, spread

    def draw(self, batch: Batch) -> Tensor:
        x = self.images[batch.draws.integers("data start", len(self.images))]
        x = x.to(batch.draws.device)
        return x + self.spread * batch.draws.normal("noise of data start", x)


class FromBatch(Fresh):
    """The batch's own noisy images: contrastive divergence (Hinton 2002).

    Args:
        spread: standard deviation of the noise, in [-1, 1] units.
    """

    def __init__(self, spread: float) -> None:
        self.spread = spread

    def draw(self, batch: Batch) -> Tensor:
        return batch.noisy(self.spread)


class FromGenerator(Fresh):
    """Images of a generator that stays as it is (Hill et al. 2022, mid-run).

    Args:
        generator: maps latents `[b, latent]` to images in [-1, 1].
        latent: numbers a latent.
    """

    def __init__(self, generator: nn.Module, latent: int) -> None:
        self.generator, self.latent = generator, latent

    def draw(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.generator(self._latents(batch))

    def _latents(self, batch: Batch) -> Tensor:
        like = batch.images.new_empty(len(batch), self.latent)
        return batch.draws.normal("latents", like)


class Cooperative(FromGenerator):
    """Images of a generator that learns where its chains end (Xie et al. 2018, cooperative nets).

    Args:
        generator: learns in place.
        latent: numbers a latent.
        lr: Adam's learning rate.
        team: the processes that learn together.
    """

    def __init__(self, generator: nn.Module, latent: int, lr: float, team: Team) -> None:
        super().__init__(generator, latent)
        self.team = team
        self.optimiser = torch.optim.Adam(generator.parameters(), lr=lr, betas=(0.5, 0.999))

    def keep(self, batch: Batch, ends: Tensor) -> None:
        """Move the generator's images a step towards the chains' ends."""
        (count,) = self.team.mean([len(batch)], batch.draws.device)
        if not count:
            return
        self.optimiser.zero_grad(set_to_none=False)
        if len(batch):
            apart = (self.generator(self._latents(batch)) - ends).square().flatten(1).mean(1)
            # By the team's mean count, since chains that began now may be unevenly shared out.
            (apart.sum() / count).backward()
        parameters = list(self.generator.parameters())
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.team.average(p.grad for p in parameters if p.grad is not None)
        self.optimiser.step()

    def state(self) -> State:
        return {"generator": self.generator.state_dict(), "optimiser": self.optimiser.state_dict()}

    def restore(self, state: State) -> None:
        _refuse_unlike(state, ("generator", "optimiser"))
        self.generator.load_state_dict(state["generator"])
        self.optimiser.load_state_dict(state["optimiser"])


class Persistent:
    """A bank of chains that go on from update to update, renewed now and then.

    Place i of a batch of b visits one of the chains i, i + b, i + 2b, …, so that every chain is
    visited equally often, and processes that hold every w-th chain have equal work. A visited chain
    is renewed with probability p *before* its K steps, and lives K/p steps on average (Hill et al.
    2022, mid-run).

    Args:
        source: where fresh chains begin.
        size: chains in the whole bank, at least the batch.
        rejuvenation: p in [0, 1].
        first: the bank's first states are drawn like batches of these places.
        team: the processes that share the bank.
        most: visits after which a chain is renewed in any case; None for no such end.
    """

    def __init__(
        self,
        source: Start,
        size: int,
        rejuvenation: float,
        first: Batch,
        team: Team,
        most: int | None = None,
    ) -> None:
        self.source, self.size, self.rejuvenation, self.team = source, size, rejuvenation, team
        parts = first.parts(math.ceil(len(first) / _DRAWN_AT_ONCE))
        self.bank = torch.cat([source.draw(part).cpu() for part in parts])
        self.most = most
        self.ages = torch.zeros(len(self.bank), dtype=torch.int64)

    def draw(self, batch: Batch) -> Tensor:
        states = self.bank[self._mine(batch)].to(batch.draws.device)
        rows = self._renewed(batch)
        if rows:
            states[rows] = self.source.draw(batch.at(rows)).to(states.dtype)
        return states

    def keep(self, batch: Batch, ends: Tensor) -> None:
        mine, rows = self._mine(batch), self._renewed(batch)
        self.bank[mine] = ends[: len(batch)].to(self.bank)
        self.source.keep(batch.at(rows), ends[rows])
        self.ages[mine[rows]] = 0
        self.ages[mine] += 1

    def _renewed(self, batch: Batch) -> list[int]:
        draws = batch.draws.uniform("renewal", batch.images.new_empty(len(batch))).cpu()
        old = self.ages[self._mine(batch)] >= (math.inf if self.most is None else self.most)
        return ((draws < self.rejuvenation) | old).nonzero()[:, 0].tolist()

    def visits(self) -> float:
        p = self.rejuvenation
        if self.most is None:
            return 1.0 / p if p else math.inf
        return sum((1.0 - p) ** k for k in range(self.most))

    def rows(self, batch: Batch) -> Tensor:
        """Return which chains of the whole bank a batch visits, `[b]`."""
        places, b = torch.tensor(batch.draws.places), batch.draws.batch
        return places + b * batch.draws.integers("visits", (self.size - places + b - 1) // b)

    def _mine(self, batch: Batch) -> Tensor:
        return self.rows(batch) // self.team.world

    def state(self) -> State:
        bank, ages = (self.team.gather(rows, self.size) for rows in (self.bank, self.ages))
        return {"bank": bank, "ages": ages, "source": self.source.state()}

    def restore(self, state: State) -> None:
        _refuse_unlike(state, ("bank", "ages", "source"))
        self.source.restore(state["source"])
        if len(state["bank"]) != self.size or state["bank"].shape[1:] != self.bank.shape[1:]:
            raise ValueError(f"its bank has shape {tuple(state['bank'].shape)}")
        self.bank = self.team.share(state["bank"]).clone()
        self.ages = self.team.share(state["ages"]).clone()


class BurnIn:
    """A bank whose chains learning never sees until they have burnt in, feeding one that it does.

    Beside each visited chain one of the burn-in bank is run as well. After so many visits it
    replaces a chain of the update bank, and starts afresh (Hill et al. 2022, long-run).

    Args:
        update: the bank that learning sees, which is never renewed otherwise.
        burning: the bank whose chains burn in.
        needed: visits until a chain has burnt in, 1 or more.
        first: the places of the burn-in bank's first states.
    """

    def __init__(self, update: Persistent, burning: Persistent, needed: int, first: Batch) -> None:
        self.update, self.burning, self.needed = update, burning, needed
        # At random, so that they do not ripen all at once.
        self.ages = first.draws.integers("ages", needed)

    def draw(self, batch: Batch) -> Tensor:
        return torch.cat([self.update.draw(batch), self.burning.draw(batch)])

    def keep(self, batch: Batch, ends: Tensor) -> None:
        seen, burnt = ends[: len(batch)].clone(), ends[len(batch) :].clone()
        mine = self.burning._mine(batch)
        self.ages[mine] += 1
        ripe = (self.ages[mine] >= self.needed).nonzero()[:, 0].tolist()
        if ripe:
            seen[ripe] = burnt[ripe]
            burnt[ripe] = self.burning.source.draw(batch.at(ripe)).to(burnt.dtype)
            self.ages[mine[ripe]] = 0
        self.update.keep(batch, seen)
        self.burning.keep(batch, burnt)

    def visits(self) -> float:
        # As many chains ripen as are visited over `needed` updates, so one stays for as long again.
        return 2.0 * self.needed

    def state(self) -> State:
        ages = self.burning.team.gather(self.ages, self.burning.size)
        return {"update": self.update.state(), "burning": self.burning.state(), "ages": ages}

    def restore(self, state: State) -> None:
        _refuse_unlike(state, ("update", "burning", "ages"))
        self.update.restore(state["update"])
        self.burning.restore(state["burning"])
        self.ages = self.burning.team.share(state["ages"]).clone()


def _refuse_unlike(state: State, keys: tuple[str, ...]) -> None:
    missing = [k for k in keys if k not in state]
    if missing:
        raise ValueError(f"its chains started otherwise: it has no {' and no '.join(missing)}")
