"""`ebm-defense bench` on the smallest cell."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from ebm_defense.commands.machine import bench
from ebm_defense.commands.machine.bench import QUICK_LAYOUTS, Bench
from ebm_defense.commands.main import main
from ebm_defense.energies.conv import ConvEnergySettings
from ebm_defense.eval.speed.roofline import LAYOUTS, Ceilings


@pytest.fixture
def _tiny(monkeypatch):
    shape = ConvEnergySettings(channels=1, image_size=8, width=2)
    monkeypatch.setitem(LAYOUTS, "tiny", shape)
    monkeypatch.setattr("ebm_defense.eval.speed.throughput.LONGEST", 5)
    monkeypatch.setattr("ebm_defense.eval.speed.throughput.SHORTEST", 5)
    monkeypatch.setattr(
        "ebm_defense.commands.machine.bench.measure_ceilings",
        lambda p, *_: Ceilings(precision=p, matmul=1e12, convolution=1e12, copy=1e11),
    )


@pytest.mark.usefixtures("_tiny")
def test_it_prints_and_writes_table_and_picture(tmp_path, capsys):
    words = ["--layouts", "tiny", "--batches", "1", "4", "--seconds", "0.01"]
    assert main(["bench", *words, "--device", "cpu", "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "bench.csv")
    assert list(table["batch"].unique()) == [1, 4]
    assert {"published", "fp32", "smoothed, fp32 chain"} <= set(table["name"])
    backward = table["name"].str.startswith("smoothed")
    assert (table["over_forward"].notna() == backward).all()
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "10000 images, broken dropped" in text
    assert (tmp_path / "bench.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "of the roofline" in printed
    assert "forward chains" in printed
    # The projection is of BPDA, which costs forward chains alone.
    assert "smoothed" not in text[text.index("10000 images, broken dropped") :]
    assert "its passes are counted" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "resnet"], "choose among cifar10"),
        (["--batches", "0"], "at least 1"),
        (["--seconds", "0"], "above 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(words, message, tmp_path, capsys):
    assert main(["bench", *words, "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("_tiny")
def test_what_does_not_fit_costs_no_more_than_its_cell(tmp_path, capsys, monkeypatch):
    honest = bench.measure

    def measure(layout, batch, *rest):
        if batch > 2:
            known = pd.read_csv(tmp_path / "bench.csv")
            assert set(known["batch"]) == {1}  # what was measured before is written already
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return honest(layout, batch, *rest)

    monkeypatch.setattr(bench, "measure", measure)
    words = ["--layouts", "tiny", "--seconds", "0.01", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["bench", *words, "--batches", "1", "4"]) == 0
    assert "batch      4 does not fit (CUDA out of memory.)" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "bench.csv")["batch"]) == {1}
    assert main(["bench", *words, "--batches", "8"]) == 2
    assert "not one batch fits" in capsys.readouterr().err


def test_the_cpu_clock_wants_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(Exception, match="OMP_NUM_THREADS=1"):
        Bench(clock="cpu", device="cpu").run()


def test_quick_is_two_layouts_and_two_batches():
    layouts, batches, seconds = Bench(quick=True)._plan(torch.device("cpu"))
    assert (layouts, batches, seconds) == (QUICK_LAYOUTS, (1, 100), 1.0)
    assert {LAYOUTS[layout].activation for layout in layouts} == {"leaky_relu", "soft_lrelu"}
