"""Folders of photos are read as people have them, and each class keeps its number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebm_defense.data import FolderSettings, Framing, folder, load_data, open_data
from ebm_defense.errors import UsageError


def shade(value: int, size: tuple[int, int] = (6, 5)) -> Image.Image:
    return Image.new("RGB", size, (value,) * 3)


def write_tree(root: Path, classes=("cat", "dog"), each=3, size=(6, 5)) -> Path:
    """Write class folders; an image is as grey as its class's place in `classes` times 20."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            shade(20 * number, size).save(root / name / f"{i}.png")
    return root


def classes_of(found) -> list[tuple[int, int]]:
    """Return the label of each image beside the class that its shade says."""
    shades = (found.images.mean((1, 2, 3)) * 255 / 20).round().int().tolist()
    return list(zip(found.labels.tolist(), shades, strict=True))


def test_a_tree_becomes_images_and_labels(tmp_path):
    found = load_data("folder", root=write_tree(tmp_path))
    assert found.images.shape == (6, 3, 5, 6)
    assert classes_of(found) == [(0, 0)] * 3 + [(1, 1)] * 3
    assert open_data("folder", root=tmp_path).classes == ("cat", "dog")


def test_a_tree_can_be_sampled(tmp_path):
    found = load_data("folder", root=write_tree(tmp_path), limit=4)
    assert found.labels.bincount().tolist() == [2, 2]


@pytest.mark.parametrize(
    "names",
    [
        [str(i) for i in range(12)],
        [f"class {i}" for i in range(12)],
        ["1", "2", "10", "a", "b2", "b10", "b10c"],
        ["007", "8", "9b", "10"],
    ],
)
def test_classes_are_numbered_as_people_count(tmp_path, names):
    root = write_tree(tmp_path, names, each=1)
    assert open_data("folder", root=root).classes == tuple(names)
    assert all(label == seen for label, seen in classes_of(load_data("folder", root=root)))


def test_hidden_names_are_no_classes_and_no_images(tmp_path):
    root = write_tree(tmp_path)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "cat/.thumbnails"):
        (root / name).mkdir()
        shade(255).save(root / name / "0.png")
    shade(255).save(root / "cat" / "._0.png")
    (root / "notes.txt").write_text("mine")
    (root / "dog" / "notes.txt").write_text("mine")
    assert classes_of(load_data("folder", root=root)) == [(0, 0)] * 3 + [(1, 1)] * 3


def test_folders_within_class_folders_are_read(tmp_path):
    root = write_tree(tmp_path)
    (root / "dog" / "more" / "still").mkdir(parents=True)
    shade(20).save(root / "dog" / "more" / "still" / "UPPER.PNG")
    assert load_data("folder", root=root).labels.tolist() == [0] * 3 + [1] * 4


def test_only_what_is_asked_for_is_decoded(tmp_path, monkeypatch):
    root, read = write_tree(tmp_path, each=20), []
    original = folder.read_photo

    def counted(path, framing):
        read.append(path)
        return original(path, framing)

    monkeypatch.setattr(folder, "read_photo", counted)
    load_data("folder", root=root, limit=4)
    assert len(read) == 4


# Size and colour


def test_photos_of_several_sizes_are_refused_by_name_or_cut(tmp_path):
    root = write_tree(tmp_path)
    shade(20, (9, 7)).save(root / "dog" / "2.png")
    with pytest.raises(UsageError, match=r"0\.png has 6x5 .*2\.png 9x7.*--crop"):
        load_data("folder", root=root)
    cut = FolderSettings(framing=Framing(crop=4))
    assert load_data("folder", root=root, folder=cut).images.shape == (6, 3, 4, 4)


def test_photos_are_read_in_grey_where_that_is_wanted(tmp_path):
    grey = FolderSettings(framing=Framing(channels=1))
    found = load_data("folder", root=write_tree(tmp_path), folder=grey)
    assert found.images.shape == (6, 1, 5, 6)
    assert classes_of(found) == [(0, 0)] * 3 + [(1, 1)] * 3


# Splits


def write_splits(root: Path, **classes) -> Path:
    for split, names in classes.items():
        for number, name in names.items():
            (root / split / name).mkdir(parents=True)
            for i in range(12):
                shade(20 * number).save(root / split / name / f"{split}{i}.png")
    return root


def test_split_folders_are_the_splits(tmp_path):
    both = {0: "cat", 1: "dog"}
    root = write_splits(tmp_path, train=both, val=both, test=both)
    for split in ("train", "val", "test"):
        found = load_data("folder", split, root=root)
        assert classes_of(found) == [(0, 0)] * 12 + [(1, 1)] * 12


def test_a_class_keeps_its_number_in_a_split_that_lacks_another(tmp_path):
    root = write_splits(tmp_path, train={0: "ant", 1: "bee", 2: "cat"}, test={1: "bee", 2: "cat"})
    assert set(classes_of(load_data("folder", root=root))) == {(1, 1), (2, 2)}
    assert open_data("folder", root=root).classes == ("ant", "bee", "cat")


def test_val_beside_train_is_the_test_split_and_val_a_share_of_train(tmp_path):
    both = {0: "cat", 1: "dog"}
    root = write_splits(tmp_path, train=both, val=both)
    (root / "annotations").mkdir()
    sizes = [len(load_data("folder", s, root=root).labels) for s in ("train", "val", "test")]
    assert sizes == [22, 2, 24]


def test_a_split_without_a_folder_is_refused(tmp_path):
    root = write_splits(tmp_path, train={0: "cat", 1: "dog"})
    with pytest.raises(UsageError, match="has no test folder, only train"):
        load_data("folder", root=root)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    root = write_tree(tmp_path, ["bus", "car", "train"])
    assert open_data("folder", root=root).classes == ("bus", "car", "train")


def test_a_tree_without_split_folders_is_for_testing_unless_a_share_is_named(tmp_path):
    root = write_tree(tmp_path, each=30)
    assert len(load_data("folder", root=root).labels) == 60
    with pytest.raises(UsageError, match=r"no train folder.*--test-share"):
        load_data("folder", "train", root=root)


def test_a_named_share_parts_a_tree(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(30):
            shade(4 * i).save(tmp_path / name / f"{i}.png")
    half = FolderSettings(test_share=0.2)
    parts = [load_data("folder", s, root=tmp_path, folder=half) for s in ("train", "val", "test")]
    assert [len(p.labels) for p in parts] == [44, 4, 12]
    assert parts[2].labels.bincount().tolist() == [6, 6]
    seen = [(int(y), float(x.mean())) for p in parts for x, y in zip(*p, strict=True)]
    assert len(set(seen)) == 60
    none = FolderSettings(test_share=0)
    assert len(load_data("folder", "train", root=tmp_path, folder=none).labels) == 55


@pytest.mark.parametrize("share", [-0.1, 1, 2])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(UsageError, match="test share"):
        FolderSettings(test_share=share)


def test_a_share_of_a_tree_with_split_folders_is_refused(tmp_path):
    root = write_splits(tmp_path, train={0: "cat"}, test={0: "cat"})
    with pytest.raises(UsageError, match="split folders already"):
        load_data("folder", root=root, folder=FolderSettings(test_share=0.5))


def test_photos_without_classes_serve_where_no_class_is_needed(tmp_path):
    for i in range(5):
        shade(i).save(tmp_path / f"{i}.png")
    with pytest.raises(UsageError, match="no folder of class folders"):
        load_data("folder", root=tmp_path)
    loose = FolderSettings(labelled=False)
    assert load_data("folder", root=tmp_path, folder=loose).labels.tolist() == [0] * 5


# Bad files


def test_an_empty_class_folder_is_named(tmp_path):
    root = write_tree(tmp_path)
    (root / "emu").mkdir()
    (root / "emu" / ".gitkeep").touch()
    with pytest.raises(UsageError, match=r"emu is a class folder without images"):
        load_data("folder", root=root)
    assert len(load_data("folder", root=root, folder=FolderSettings(skip_bad=True)).labels) == 6


def test_a_folder_without_class_folders_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no folder of class folders"):
        load_data("folder", root=tmp_path)


def test_a_bad_file_is_named_or_skipped_on_request(tmp_path, caplog):
    root = write_tree(tmp_path)
    (root / "dog" / "1.png").write_text("<html>404</html>")
    with pytest.raises(UsageError, match=r"dog/1\.png is no image"):
        load_data("folder", root=root)
    found = load_data("folder", root=root, folder=FolderSettings(skip_bad=True))
    assert found.labels.tolist() == [0, 0, 0, 1, 1]
    assert "1 bad files are left out" in caplog.text
    assert "dog/1.png" in caplog.text


def test_a_sample_is_filled_up_where_files_are_bad(tmp_path):
    root = write_tree(tmp_path, each=10)
    for i in range(4):
        (root / "dog" / f"{i}.png").write_text("nothing")
    skip = FolderSettings(skip_bad=True)
    assert len(load_data("folder", root=root, limit=16, folder=skip).labels) == 16
    with pytest.raises(UsageError, match="17 images asked for, but only 16 can be read"):
        load_data("folder", root=root, limit=17, folder=skip)


# Class maps


def test_a_class_map_gives_each_folder_its_output(tmp_path):
    root = write_tree(tmp_path / "tree", ["n01440764", "n02102040", "n03028079"], each=1)
    names = ["tench", *["x"] * 216, "English springer", *["x"] * 279, "church"]
    synsets = ["n01440764", *[f"n9{i:07}" for i in range(216)], "n02102040",
               *[f"n8{i:07}" for i in range(279)], "n03028079"]  # fmt: skip
    forms = {
        "names.json": json.dumps({s: i for i, s in enumerate(synsets)}),
        "keras.json": json.dumps(
            {str(i): [s, n] for i, (s, n) in enumerate(zip(synsets, names, strict=True))}
        ),
        "list.json": json.dumps(synsets),
        "synsets.txt": "\n".join(synsets) + "\n",
        "words.txt": "\n".join(f"{s} {n}, y" for s, n in zip(synsets, names, strict=True)),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        settings = FolderSettings(class_map=str(tmp_path / name))
        source = open_data("folder", root=root, folder=settings)
        assert source.labels.tolist() == [0, 217, 497], name
        assert len(source.classes) == 498
        assert source.classes[217] == "n02102040"


def test_folders_named_by_their_outputs_are_taken_at_their_word(tmp_path):
    root = write_tree(tmp_path, ["3", "5", "10"], each=1)
    found = load_data("folder", root=root, folder=FolderSettings(class_map="numbers"))
    assert found.labels.tolist() == [3, 5, 10]


def test_names_are_matched_whole(tmp_path):
    (tmp_path / "names.txt").write_text("tiger shark\ntiger cat\ntabby\n")
    root = write_tree(tmp_path / "tree", ["tabby", "tiger cat"], each=1)
    settings = FolderSettings(class_map=str(tmp_path / "names.txt"))
    assert open_data("folder", root=root, folder=settings).labels.tolist() == [2, 1]
    (root / "tabby").rename(root / "tiger")
    with pytest.raises(UsageError, match="lacks the class folder 'tiger'"):
        open_data("folder", root=root, folder=settings)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.json", "{", "cannot be read"),
        ("m.json", "3", "must map"),
        ("m.json", '{"cat": -1, "dog": 0}', "must map"),
        ("m.json", '{"cat": 1, "dog": 1}', "to another class too"),
        ("m.txt", "", "must map"),
        ("m.txt", "cat\n", "lacks the class folder 'dog'"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_class_maps_that_do_not_fit_are_refused(tmp_path, name, text, said):
    root = write_tree(tmp_path / "tree")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        open_data("folder", root=root, folder=FolderSettings(class_map=str(tmp_path / name)))


def test_numbers_want_folders_named_by_numbers(tmp_path):
    with pytest.raises(UsageError, match="named by numbers, not 'cat'"):
        load_data("folder", root=write_tree(tmp_path), folder=FolderSettings(class_map="numbers"))


def test_a_folder_needs_a_root():
    with pytest.raises(UsageError, match="needs a data root"):
        load_data("folder")


def test_photos_come_out_alike_however_many_are_read(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "cat").mkdir()
    for i in range(9):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "cat" / f"{i}.png")
    source = open_data("folder", root=tmp_path)
    whole = source.take().images
    assert torch.equal(source.read(torch.tensor([7, 2])).images, whole[[7, 2]])


# What else lies in folders.


def test_a_split_without_class_folders_beside_one_with_them_is_refused(tmp_path):
    write_tree(tmp_path / "train")
    (tmp_path / "val").mkdir()
    shade(9).save(tmp_path / "val" / "ILSVRC2012_val_00000001.png")
    with pytest.raises(UsageError, match=r"val holds no class folders; sort its photos into cat"):
        load_data("folder", root=tmp_path)


def test_a_folder_around_the_folder_is_refused_by_name(tmp_path):
    write_tree(tmp_path / "data" / "train")
    write_tree(tmp_path / "data" / "val")
    with pytest.raises(UsageError, match=r"name .*data instead"):
        load_data("folder", root=tmp_path)


def test_a_link_back_is_not_followed(tmp_path):
    write_tree(tmp_path, each=1)
    (tmp_path / "cat" / "loop").symlink_to(tmp_path)
    (tmp_path / "dog" / "self").symlink_to("self")
    assert load_data("folder", root=tmp_path).labels.tolist() == [0, 1]


def test_a_link_to_elsewhere_is_a_class(tmp_path):
    root = write_tree(tmp_path / "a", each=1)
    (root / "emu").symlink_to(write_tree(tmp_path / "b", ["photos"], each=2) / "photos")
    assert load_data("folder", root=root).labels.tolist() == [0, 1, 2, 2]


def test_an_accent_is_one_class_however_it_is_written(tmp_path):
    names = {"train": "caf\u00e9", "val": "cafe\u0301"}
    for split, name in names.items():
        write_tree(tmp_path / split, [name, "dog"], each=1)
    (tmp_path / "map.txt").write_text("dog\ncaf\u00e9\n", encoding="utf-8-sig")
    assert open_data("folder", root=tmp_path).classes == ("caf\u00e9", "dog")
    mapped = FolderSettings(class_map=str(tmp_path / "map.txt"))
    assert load_data("folder", root=tmp_path, folder=mapped).labels.tolist() == [1, 0]


def test_a_photo_that_only_a_plugin_reads_is_not_passed_over(tmp_path):
    write_tree(tmp_path, each=1)
    (tmp_path / "cat" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UsageError, match=r"phone.HEIC .* save it as JPEG or PNG"):
        load_data("folder", root=tmp_path)


@pytest.mark.parametrize("name", ["a.gif", "a.jfif", "a.JPE", "a.pbm"])
def test_rarer_names_of_photos_are_read(tmp_path, name):
    write_tree(tmp_path, each=1)
    form = {"gif": "GIF", "pbm": "PPM"}.get(name.split(".")[1], "JPEG")
    shade(0).convert("1" if form == "PPM" else "L").save(tmp_path / "cat" / name, form)
    assert load_data("folder", root=tmp_path).labels.tolist() == [0, 0, 1]


def test_a_batch_of_bad_files_alone_is_filled_up(tmp_path):
    write_tree(tmp_path, each=1)
    for i in range(5):
        (tmp_path / "cat" / f"bad {i}.png").write_bytes(b"")
    found = load_data("folder", limit=2, root=tmp_path, folder=FolderSettings(skip_bad=True))
    assert sorted(found.labels.tolist()) == [0, 1]


@pytest.mark.parametrize("limit", [2.0, "2", np.int8(2)])
def test_numbers_come_in_any_form(tmp_path, limit):
    framing = Framing(crop=np.int64(4), channels=1.0, resize="4")
    found = load_data("folder", limit=limit, root=write_tree(tmp_path),
                      folder=FolderSettings(framing=framing, test_share=None))  # fmt: skip
    assert found.images.shape == (2, 1, 4, 4)


def test_a_file_is_no_data_folder(tmp_path):
    shade(0).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="is a file"):
        load_data("folder", root=tmp_path / "a.png")
