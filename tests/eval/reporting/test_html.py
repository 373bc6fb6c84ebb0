"""The page of a run: complete, escaped, alone in the world, and fit for a phone."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import re
import shutil
import subprocess

import pandas as pd
import pytest
import torch
from PIL import Image

from ebm_defense.attacks import PGD, ThreatModel
from ebm_defense.eval import Flag, Protocol, Report, TwoStage
from ebm_defense.eval.reporting.figures.pictures import draw_strip
from ebm_defense.eval.reporting.html import confident_breaks, report_page
from ebm_defense.eval.reporting.page import png

NAME = "0 PGD-2"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture
def report() -> Report:
    """Six images: two stand, one was wrong from the start, three were broken."""
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand((6, 1, 8, 8), generator=generator)
    adversarial = (originals + 0.1 * torch.randn((6, 1, 8, 8), generator=generator)).clamp(0, 1)
    attack = PGD(threat=ThreatModel(eps=0.1), steps=2, step_size=0.05, replicates=2)
    return Report(
        settings={
            "seed": 0,
            "defense": {"purifier": {"kind": "GaussianNoise", "std": 0.25}},
            "data": {"sha256": "ab<c>"},
        },
        protocol=Protocol(
            name="quick",
            attacks=(attack,),
            judge_replicates=8,
            verdict=TwoStage(),
            looks="every",
        ),
        records=pd.DataFrame(
            {
                "image": range(6),
                "label": [3, 1, 4, 1, 5, 2],
                "clean": [1, 1, 1, 1, 1, 0],
                "natural": [1, 1, 1, 1, 1, 0],
                "clean: draws": [4] * 6,
                "clean: failures": [0, 0, 0, 0, 1, 4],
                "clean: mean logits": [1, 1, 1, 1, 1, 0],
                "clean: majority": [1, 1, 1, 1, 1, 0],
                f"{NAME}: stands": [1, 0, 0, 0, 1, 0],
                f"{NAME}: broken at": [-1, 0, 2, 1, -1, 0],
                f"{NAME}: votes": [float("nan"), 0.5, 0.0, 0.25, 1.0, float("nan")],
            }
        ),
        adversarial={NAME: adversarial},
        originals=originals,
        chain_steps={"PGD-2": 1234},
        seconds={"PGD-2": 5.0},
        name="my <defense>",
    )


class Reader(html.parser.HTMLParser):
    """Collects every address a page refers to, and its visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses, self.text = [], []

    def handle_starttag(self, tag, attrs):
        assert tag != "script"
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_the_page_needs_nothing_but_itself(report):
    page = report_page(report)
    assert all(a.startswith(("data:", "#")) for a in read(page).addresses)
    assert "@import" not in page
    assert not re.search(r"url\((?!#|data:)", page)


def test_the_page_says_everything(report):
    text = " ".join("".join(read(report_page(report)).text).split())
    for said in ("my <defense>", "83.3%", "33.3", "Linf 0.1", "8 fresh", "1,234", "GaussianNoise"):
        assert said in text
    assert "ab<c>" in text  # every setting, escaped
    assert "<defense>" not in report_page(report)


def test_the_most_confident_breaks_come_first_and_natural_errors_not_at_all(report):
    breaks = list(confident_breaks(report))
    assert [b["image"] for b in breaks] == [2, 3, 1]
    assert [b["votes"] for b in breaks] == ["0%", "25%", "50%"]
    assert [b["step"] for b in breaks] == [2, 1, 0]
    assert [b["image"] for b in confident_breaks(report, most=1)] == [2]


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_images_keep_their_pixels():
    image = torch.linspace(0, 1, 64).view(1, 8, 8)
    found = torch.tensor(list(decoded(png(image)).getdata()))
    assert torch.equal(found, (image * 255).round().flatten().long())
    assert decoded(png(image.expand(3, 8, 8))).mode == "RGB"


def test_the_difference_is_grey_where_nothing_changed(report):
    adversarial = report.originals.clone()
    adversarial[2, 0, 3, 3] = 1.0 - adversarial[2, 0, 3, 3].round()
    report = dataclasses.replace(report, adversarial={NAME: adversarial})
    first = next(iter(confident_breaks(report)))
    pixels = list(decoded(first["difference"]).getdata())
    assert pixels.count(128) == 63
    assert pixels[3 * 8 + 3] in (0, 255)


def test_flags_are_shown_with_their_evidence_and_advice(report):
    flag = Flag(name="no gradient", evidence="0 on 12 of 16 <b>", advice="Use BPDA.")
    text = "".join(read(report_page(dataclasses.replace(report, flags=(flag,)))).text)
    for said in ("[1] no gradient", "0 on 12 of 16 <b>", "Use BPDA."):
        assert said in text
    assert "None was raised" in "".join(read(report_page(report)).text)


def test_a_run_without_breaks_says_so(report):
    records = report.records.assign(**{f"{NAME}: stands": report.records["natural"]})
    assert "No image that was right" in report_page(dataclasses.replace(report, records=records))


def shot(page: str, folder, width: int, *words: str, height: int = 1500) -> Image.Image:
    """Return the picture that a browser shows of a page."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    picture = folder / "shot.png"
    words += ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    words += ("--hide-scrollbars", f"--user-data-dir={folder / 'profile'}")
    words += (f"--window-size={width},{height}", f"--screenshot={picture}")
    line = [CHROMIUM, *words, (folder / "page.html").as_uri()]
    subprocess.run(line, check=True, capture_output=True, timeout=120)
    return Image.open(picture)


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)


@needs_browser
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(report, tmp_path):
    for width in (390, 1200):
        with shot(report_page(report), tmp_path, width) as picture:
            assert picture.width == width
            grey = picture.convert("L")
            # Text stands in the upper part, and nothing crosses the right margin.
            assert grey.crop((0, 0, width, 400)).getextrema()[0] < 100
            margin = set(grey.crop((width - 8, 0, width, 1500)).getdata())
            assert max(margin) - min(margin) < 30


@needs_browser
def test_in_the_dark_nothing_stands_on_white(report, tmp_path):
    strip = tmp_path / "strip.png"
    draw_strip([("original", torch.zeros(3, 1, 8, 8))] * 2, strip, title="title")
    page = report_page(report, strip=strip.read_bytes())
    dark = "--blink-settings=preferredColorScheme=0"
    with shot(page, tmp_path, 700, dark, height=2200) as picture:
        shades = picture.convert("L").histogram()
    assert sum(shades[:64]) > 0.8 * sum(shades)
    assert sum(shades[240:]) < 0.02 * sum(shades)
