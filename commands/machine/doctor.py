"""`ebm-defense doctor`."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ebm_defense import __version__
from ebm_defense.data import cache_folder, data_roots
from ebm_defense.data.published import DEBIAN_FASHION_MNIST
from ebm_defense.engine import triton_kernels
from ebm_defense.eval.storage.settings import environment
from ebm_defense.precision.devices import (
    CHECKS,
    SelfCheck,
    checked_device,
    device_name,
    driver,
    sentence,
)
from ebm_defense.precision.names import resolve_precision
from ebm_defense.storage.files import write_text
from ebm_defense.storage.folders import shipped, shipped_folder

TRACES: dict[str, tuple[str, ...]] = {
    "fashion-mnist": ("FashionMNIST/raw",),
    "mnist": ("MNIST/raw",),
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "svhn": ("test_32x32.mat", "train_32x32.mat"),
}
"""By data set, what of it lies in a data root."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine has and check what of it computes as it should.

    One page of Markdown, to read and to paste into a bug report: versions, devices with what was
    found of each, data, extras, folders, and one recommendation. The status is 1 if a check fails.
    """

    again: bool = False
    """Check devices anew, whatever was found of them before."""
    out: Path | None = None
    """Write the page into this file too."""

    def run(self) -> int:
        """Print the page."""
        found = {device: checked_device(device, self.again) for device in devices()}
        page = "\n".join(
            [
                f"# ebm-defense {__version__} on this machine",
                *versions(),
                *(line for device, check in found.items() for line in device_lines(device, check)),
                *data_lines(),
                *extra_lines(),
                *folder_lines(),
                "\n## Recommendation\n",
                recommendation(found),
            ]
        )
        print(page)
        if self.out is not None:
            write_text(self.out, page + "\n")
        return int(any(check.failed for check in found.values()))


def devices() -> list[torch.device]:
    """Return what chains can run on here."""
    here = [torch.device("cpu")]
    if torch.cuda.is_available():
        here += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return here + [torch.device("mps")] * torch.backends.mps.is_available()


def versions() -> list[str]:
    """Return the section of versions."""
    here = environment()
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    built = torch.version.cuda or torch.version.hip or "none"
    cudnn = torch.backends.cudnn.version() or "none"
    return [
        "\n## Versions\n",
        f"- Python {here['python']}, {here['system']}",
        f"- {packages}",
        f"- torch is built for CUDA or ROCm: {built}; cuDNN: {cudnn}; driver: {driver()}; Triton: "
        f"{triton_kernels.VERSION}",
        f"- {here['processor']}, {here['threads']} threads",
    ]


def device_lines(device: torch.device, found: SelfCheck) -> list[str]:
    """Return the section of a device: what it has and what was found of it."""
    precisions = {p: resolve_precision(p, device, torch.float32) == p for p in ("bf16", "tf32")}
    native = resolve_precision("fastest", device, torch.float32) == "bf16"
    bf16 = "native" if native else "emulated" if precisions["bf16"] else "no"
    graphs = "yes" if device.type == "cuda" else "no"
    rows = [
        f"| {name} | {error:.2g} | {CHECKS[name].limit:g} | "
        f"{'FAILS' if name in found.failed else 'passes'} |"
        for name, error in found.errors.items()
        if name in CHECKS
    ]
    return [
        f"\n## {device}: {device_name(device)}\n",
        f"bf16: {bf16}; tf32: {'yes' if precisions['tf32'] else 'no'}; graphs: {graphs}"
        f"{_memory(device)}.\n",
        "| check | error | limit | |",
        "|:--|--:|--:|:--|",
        *rows,
        *(f"\n{sentence(device, name, found)}" for name in found.failed),
    ]


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = (n / 2**30 for n in torch.cuda.mem_get_info(device))
    return f"; memory: {free:.1f} of {total:.1f} GiB free"


def data_lines() -> list[str]:
    """Return the section of data sets, found by their names alone."""
    found = {name: next(_places(name), None) for name in TRACES}
    return [
        "\n## Data sets\n",
        *(
            f"- {name}: {place or 'not here; downloaded at first use'}"
            for name, place in found.items()
        ),
        "- fashion-mnist-sample, digits: with the packages",
    ]


def _places(name: str) -> Iterator[Path]:
    places = [root / trace for root in data_roots() for trace in TRACES[name]]
    if name == "fashion-mnist":
        places.append(DEBIAN_FASHION_MNIST)
    yield from (place for place in places if place.exists())


def extra_lines() -> list[str]:
    """Return the section of this package's extras and what of them is installed."""
    extras: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("ebm-defense") or ():
        name, extra = (
            re.match(r"[\w.-]+", requirement),
            re.search(r"extra == ['\"](\w+)", requirement),
        )
        if name and extra and extra[1] != "dev":
            extras.setdefault(extra[1], []).append(name[0])
    return [
        "\n## Extras\n",
        *(f"- {extra}: {', '.join(map(_installed, names))}" for extra, names in extras.items()),
    ]


def _installed(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"


def folder_lines() -> list[str]:
    """Return the section of folders."""
    names = ", ".join(s.name for s in shipped())
    return [
        "\n## Folders\n",
        f"- data are looked for in: {', '.join(map(str, data_roots()))}",
        f"- findings and downloads are kept in: {cache_folder()}",
        f"- shipped defenses: {names}, in {shipped_folder()}",
    ]


def recommendation(found: dict[torch.device, SelfCheck]) -> str:
    """Return the one thing to do."""
    failing = [str(device) for device, check in found.items() if check.failed]
    gpu = any(device.type == "cuda" for device in found)
    if failing:
        return (
            f"{', '.join(failing)} fails a check, and slower ways are taken there; update driver "
            "and torch, and if that does not help, report this page."
        )
    if not gpu and driver() != "none":
        return "There is an NVIDIA driver, but torch sees no GPU: install a torch built for CUDA."
    if gpu:
        return "Measure this GPU with `benchmarks/gpu_certify.sh`, and let `--device auto` use it."
    if resolve_precision("fastest", torch.device("cpu"), torch.float32) != "bf16":
        return "This processor has no bf16 arithmetic: chains run in fp32; a GPU is far faster."
    return "Chains may run in bf16 here; `ebm-defense bench --quick` measures how fast."
