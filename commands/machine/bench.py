"""`ebm-defense bench`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch

from ebm_defense.commands.options.shared import Device, resolve_device
from ebm_defense.errors import UsageError
from ebm_defense.eval.reporting.renderers import RENDERERS
from ebm_defense.eval.reporting.table import plain_table
from ebm_defense.eval.speed.projection import Passes, PublishedCost, measure_passes
from ebm_defense.eval.speed.roofline import LAYOUTS, Ceilings, measure_ceilings
from ebm_defense.eval.speed.throughput import PUBLISHED, Cell, measure, precisions_here
from ebm_defense.eval.storage.settings import environment
from ebm_defense.runtime.packing import Try
from ebm_defense.runtime.timing import CLOCKS
from ebm_defense.storage.files import atomic, writable_folder, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCHES, GPU_BATCHES = (1, 10, 150, 1000), (1, 10, 150, 1000, 10000)
QUICK_BATCHES, QUICK_LAYOUTS = (1, 100), ("fashion-mnist-16", "fashion-mnist-16-smooth")
IMAGES = (500, 10_000)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure Langevin steps a second here: the published loop, ours, and the gradient through it.

    They take turns. Where the activations are smooth the gradient is the exact one, elsewhere the
    smoothed one, as attacks use them: fp32 products, whatever the chain's precision.
    Writes bench.csv, bench.md and bench.png into OUT.
    """

    layouts: tuple[str, ...] = ()
    """cifar10, fashion-mnist-16 and fashion-mnist-32, each also with -smooth; all if none."""
    batches: tuple[int, ...] = ()
    """Chains at a time; 1, 10, 150 and 1000 if none, and 10000 on a GPU."""
    seconds: float = 5.0
    """Time for each competitor in each cell."""
    quick: bool = False
    """Two layouts, two batches, one second each."""
    compiled: bool = False
    """Let the published loop run compiled by torch.compile, too."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu leaves out the time that other programs take; for one thread on a busy machine."""
    device: Device = "auto"
    """Where to compute."""
    out: Path = Path("bench")
    """Folder for the table and the picture."""

    def run(self) -> int:
        """Measure, print, write."""
        device = resolve_device(self.device)
        layouts, batches, seconds = self._plan(device)
        out, clock = writable_folder(self.out), CLOCKS[self.clock]
        ceilings = [measure_ceilings(p, seconds, device, clock) for p in precisions_here(device)]
        print(ceilings_line(ceilings), flush=True)
        cells: list[Cell] = []
        for layout in layouts:
            for batch in batches:
                cells += self._cells(layout, batch, ceilings, seconds, device)
                write_csv(out, cells)
        if not cells:
            raise UsageError("not one batch fits into the memory; give smaller --batches.")
        kinds = {LAYOUTS[name].channels: name for name in layouts}
        passes = {c: measure_passes(name, seconds, device, clock) for c, name in kinds.items()}
        write_results(out, ceilings, cells, passes, self.clock)
        print(f"bench.csv, bench.md and bench.png are in {out}")
        return 0

    def _cells(
        self,
        layout: str,
        batch: int,
        ceilings: list[Ceilings],
        seconds: float,
        device: torch.device,
    ) -> list[Cell]:
        """Measure and print a layout at a batch; say so where memory does not hold it."""
        clock = CLOCKS[self.clock]
        attempt = Try()
        measured: list[Cell] = []
        with attempt:
            measured = measure(layout, batch, ceilings, seconds, device, clock, self.compiled)
            print(*map(cell_line, measured), sep="\n", flush=True)
        if attempt.reason:
            print(f"{layout:<24} batch {batch:>6} does not fit ({attempt.reason})", flush=True)
        return measured

    def _plan(self, device: torch.device) -> tuple[tuple[str, ...], tuple[int, ...], float]:
        """Return layouts, batches and seconds, or raise a `UsageError`."""
        for layout in self.layouts:
            if layout not in LAYOUTS:
                raise UsageError(f"unknown layout {layout!r}; choose among {', '.join(LAYOUTS)}.")
        if any(b < 1 for b in self.batches) or not self.seconds > 0:
            raise UsageError("batches must be at least 1 and seconds above 0.")
        if self.clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
            raise UsageError("--clock cpu needs a CPU and one thread: set OMP_NUM_THREADS=1.")
        usual = GPU_BATCHES if device.type == "cuda" else BATCHES
        batches = self.batches or (QUICK_BATCHES if self.quick else usual)
        layouts = self.layouts or (QUICK_LAYOUTS if self.quick else tuple(LAYOUTS))
        return layouts, batches, min(self.seconds, 1.0) if self.quick else self.seconds


def ceilings_line(ceilings: list[Ceilings]) -> str:
    """Say what the machine reaches."""
    return "\n".join(
        f"{c.precision}: matrix product {c.matmul / 1e9:,.0f}, convolution "
        f"{c.convolution / 1e9:,.0f} GFLOP/s, copy {c.copy / 1e9:,.1f} GB/s"
        for c in ceilings
    )


def cell_line(cell: Cell) -> str:
    """Say one measurement."""
    memory = "" if cell.memory is None else f", peak {cell.memory / 2**20:,.0f} MiB"
    cost = "" if cell.over_forward is None else f", {cell.over_forward:.2f} forward chains"
    return (
        f"{cell.layout:<24} batch {cell.batch:>6} {cell.name:<20}"
        f"{cell.steps_per_second:>12,.0f} steps/s  {cell.ratio:>6.2f}x  "
        f"{cell.roofline:>4.0%} of the roofline, {cell.convolution:>4.0%} of convolution"
        f"{memory}{cost}"
    )


def write_csv(out: Path, cells: list[Cell]) -> pd.DataFrame:
    """Write what was measured so far, which a full memory may be the end of."""
    table = pd.DataFrame([asdict(cell) for cell in cells])
    write_text(out / "bench.csv", table.to_csv(index=False))
    return table


def write_results(
    out: Path,
    ceilings: list[Ceilings],
    cells: list[Cell],
    passes: dict[int, dict[bool, Passes]],
    clock: str,
) -> None:
    """Write the table as CSV and Markdown, and the picture."""
    table, where = write_csv(out, cells), environment()
    text = [
        f"{where['processor']}, {where['threads']} threads, GPU {where['gpu']}, torch "
        f"{where['packages']['torch']}, {clock} clock.",
        ceilings_line(ceilings),
        RENDERERS["markdown"](plain_table(table, words=3, floats=".3g")).rstrip(),
        projection(cells, passes),
    ]
    write_text(out / "bench.md", "\n\n".join(text) + "\n")
    print(text[-1])
    draw(cells, out / "bench.png")


def projection(cells: list[Cell], passes: dict[int, dict[bool, Passes]]) -> str:
    """Return the time of the whole published protocol at each layout's best rate, as Markdown.

    Args:
        cells: what was measured of chains.
        passes: of the classifiers, by their channels, as published and (False) as ours.
    """
    p = PublishedCost()
    rows = [
        {
            "layout": layout,
            "by": best.name,
            "batch": best.batch,
            **{
                f"{n} images, {what}, hours": n
                * p.seconds(
                    best.steps_per_second,
                    passes[LAYOUTS[layout].channels][best.name.startswith(PUBLISHED)],
                    drop_broken=drop,
                )
                / 3600
                for n in IMAGES
                for what, drop in (("all to the end", False), ("broken dropped", True))
            },
        }
        for layout, best in _best(cells)
    ]
    said = (
        f"The published protocol: {p.looks} looks of {p.replicates} chains of {p.steps} "
        f"steps; assumed are {p.verifications:g} verifications of {p.verification} chains an "
        f"image, {p.robust:.0%} robust images and broken ones that fall after "
        f"{p.broken_after:.0%} of the looks. The classifier is a wide ResNet, 28-10 on CIFAR-10 "
        "and 10-2 on Fashion-MNIST; its passes are counted."
    )
    table = plain_table(pd.DataFrame(rows), notes=(said,), words=2, floats=",.2f")
    return RENDERERS["markdown"](table).rstrip()


def _best(cells: list[Cell]) -> list[tuple[str, Cell]]:
    """Return each layout's fastest chains: the published loop's and ours."""
    groups: dict[tuple[str, bool], list[Cell]] = {}
    for cell in cells:
        if cell.over_forward is None:
            groups.setdefault((cell.layout, cell.name.startswith(PUBLISHED)), []).append(cell)
    return [
        (layout, max(same, key=lambda c: c.steps_per_second))
        for (layout, _), same in groups.items()
    ]


def draw(cells: list[Cell], path: Path) -> None:
    """Draw, a column a layout, steps a second over the batch, and under them gradients' costs."""
    from matplotlib.figure import Figure

    layouts = list(dict.fromkeys(cell.layout for cell in cells))
    figure = Figure(figsize=(3.2 * len(layouts) + 1, 5.4), layout="constrained")
    axes = figure.subplots(
        2, len(layouts), squeeze=False, sharex="col", sharey="row", height_ratios=(2, 1)
    )
    for layout, (rates, costs) in zip(layouts, axes.T, strict=True):
        for name in dict.fromkeys(cell.name for cell in cells if cell.layout == layout):
            _draw_lines(rates, costs, [c for c in cells if (c.layout, c.name) == (layout, name)])
        rates.set(title=layout, xscale="log", yscale="log")
        costs.set(xlabel="chains at a time")
        rates.legend(fontsize="x-small")
        for axis in (rates, costs):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("Langevin steps a second")
    axes[1, 0].set_ylabel("gradient's time\nin forward chains")
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130)


def _draw_lines(rates: Axes, costs: Axes, cells: list[Cell]) -> None:
    batches = [c.batch for c in cells]
    over = [c.over_forward for c in cells if c.over_forward is not None]
    (line,) = rates.plot(
        batches, [c.steps_per_second for c in cells], "--" if over else "-", marker="o",
        markersize=4, label=cells[0].name,
    )  # fmt: skip
    if over:
        costs.plot(batches, over, "--o", markersize=4, color=line.get_color())
