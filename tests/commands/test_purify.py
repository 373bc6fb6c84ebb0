"""`purify` reads what people have, writes it under its own name, and replaces no input."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_images(folder: Path, size: int, count: int = 3) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{i}.png")
    return folder


def test_purify_writes_images_and_a_film_strip(run, tiny_defense, tmp_path: Path) -> None:
    folder, out = write_images(tmp_path / "in", 8), tmp_path / "out"
    status, printed, _ = run("purify", folder, "--purifier", tiny_defense, "--out", out)
    assert status == 0
    assert "3 purified images" in printed
    names = {p.name for p in out.iterdir()}
    assert names == {"image0.png", "image1.png", "image2.png", "film_strip.png"}
    with Image.open(out / "image0.png") as purified, Image.open(folder / "image0.png") as original:
        assert purified.size == original.size
        assert np.asarray(purified).std() > 0
        assert not np.array_equal(np.asarray(purified), np.asarray(original))


def test_adjusted_steps_are_counted(run, tiny_defense, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 8)
    words = ("purify", folder, "--adjusted", "--out", tmp_path / "out")
    status, printed, _ = run(*words, "--purifier", tiny_defense)
    assert status == 0
    assert "% of the first images' steps are accepted" in printed
    status, _, error = run(*words, "--purifier", "jpeg:75")
    assert status == 2
    assert "--adjusted is for the Langevin chain" in error


def test_purify_names_mistakes(run, tiny_defense, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 9)
    words = ("--purifier", tiny_defense, "--out", tmp_path / "out")
    status, _, err = run("purify", folder, *words)
    assert status == 2
    assert "8x8" in err
    assert run("purify", folder, *words, "--size", 8)[0] == 0
    assert run("purify", tmp_path / "nowhere", *words)[0] == 2
    assert run("purify", folder, "--purifier", "jpeg:75", "--out", folder)[0] == 2
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "no image" in run("purify", tmp_path / "broken.png", *words)[2]
    (tmp_path / "empty").mkdir()
    assert "no images there" in run("purify", tmp_path / "empty", *words)[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_input_called_like_the_film_strip_gets_its_own_file(run, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 8, 1)
    (folder / "image0.png").rename(folder / "film_strip.png")
    before, out = contents(folder), tmp_path / "out"
    status, printed, _ = run("purify", folder, "--purifier", "none", "--out", out)
    assert status == 0
    assert "film_strip-2.png" in printed
    assert contents(folder) == before
    with Image.open(out / "film_strip.png") as same, Image.open(folder / "film_strip.png") as one:
        assert np.array_equal(np.asarray(same.convert("L")), np.asarray(one))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_output_replaces_an_input_under_another_name(run, tmp_path: Path, link) -> None:
    folder, out = write_images(tmp_path / "in", 8), tmp_path / "out"
    out.mkdir()
    link(folder / "image1.png", out / "image0.png")
    before = contents(folder)
    status, _, err = run("purify", folder, "--purifier", "none", "--out", out)
    assert status == 2
    assert "would be replaced" in err
    link(folder / "image2.png", tmp_path / "film_strip.png")
    (out / "image0.png").unlink()
    link(folder / "image2.png", out / "film_strip.png")
    assert run("purify", folder, "--purifier", "none", "--out", out)[0] == 0
    assert contents(folder) == before


def test_the_images_own_folder_is_no_place_for_them(run, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 8)
    for words in ([folder], [folder / "image0.png"]):
        assert run("purify", *words, "--purifier", "none", "--out", folder)[0] == 2
    sub = write_images(folder / "sub", 8)
    assert run("purify", sub / "image0.png", "--purifier", "none", "--out", folder)[0] == 2


def test_folders_are_searched_to_the_bottom_and_what_was_written_is_left_out(
    run, tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "in", 8)
    (folder / "more").mkdir()
    write_images(folder / "more" / "still", 8, 1)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.png").write_bytes(b"nothing")
    out = folder / "purified"
    for _ in range(2):
        status, printed, _ = run("purify", folder, "--purifier", "none", "--out", out)
        assert status == 0
        assert "4 purified images" in printed
    assert (out / "more" / "still" / "image0.png").exists()


def test_two_files_that_would_become_one_are_refused(run, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 8)
    Image.new("L", (8, 8)).save(folder / "image0.JPG")
    status, _, err = run("purify", folder, "--purifier", "none", "--out", tmp_path / "out")
    assert status == 2
    assert "would both become" in err


def test_images_of_several_sizes_are_purified_each_with_its_own_noise(run, tmp_path: Path) -> None:
    folder, alone = write_images(tmp_path / "in", 8), tmp_path / "alone"
    Image.new("L", (9, 7)).save(folder / "image1.png")
    words = ("--purifier", "gaussian:0.1", "--out")
    assert run("purify", folder, *words, tmp_path / "out")[0] == 0
    with Image.open(tmp_path / "out" / "image1.png") as image:
        assert image.size == (9, 7)
    (folder / "image1.png").unlink()
    write_images(alone, 8)
    assert run("purify", alone, *words, tmp_path / "other")[0] == 0
    one, other = ((tmp_path / f / "image2.png").read_bytes() for f in ("out", "other"))
    assert one == other


def test_bad_files_are_left_out_on_request(run, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 8)
    (folder / "image1.png").write_bytes((folder / "image1.png").read_bytes()[:-40])
    words = ("purify", folder, "--purifier", "none", "--out", tmp_path / "out")
    status, _, err = run(*words)
    assert status == 2
    assert "image1.png" in err
    status, printed, _ = run(*words, "--skip-bad")
    assert status == 0
    assert "left out: " in printed
    assert "2 purified images" in printed


def test_photos_are_purified_upright_and_over_the_background(run, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (12, 8), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    words = ("--purifier", "none", "--background", "black", "--out", tmp_path / "out")
    assert run("purify", tmp_path / "a.png", *words)[0] == 0
    with Image.open(tmp_path / "out" / "a.png") as found:
        assert found.size == (8, 12)
        assert np.asarray(found).max() == 0
