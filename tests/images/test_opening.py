"""Pictures from strangers: programs in a picture's clothes, paths that lead elsewhere, and formats against Pillow."""

import ast
import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms
from pyarrow import fs

import igpt_lab
from igpt_lab.app import cli
from igpt_lab.app.commands import sampling
from igpt_lab.core.storage import Remote
from igpt_lab.images import opening
from igpt_lab.images.loading import load_images
from igpt_lab.images.opening import BadImage, decode, formats, open_image, read_image, read_inside
from igpt_lab.models.imagegpt import ImageGPTForImageClassification

PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n"
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encoded(form: str = "PNG", pixels: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def table(file: Path, /, **cells) -> Path:
    """A Parquet file with one image in its column."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": None} | cells], kind)}), file)
    return file


@pytest.fixture
def no_program(monkeypatch):
    def run(*_, **__):
        pytest.fail("Pillow started Ghostscript")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)


def test_a_program_named_as_a_picture_does_not_run(no_program, tiny, tmp_path, capsys):
    with Image.open(io.BytesIO(PROGRAM)) as image, pytest.raises(pytest.fail.Exception):
        image.load()  # what Pillow does of itself
    path = tmp_path / "set" / "x.png"
    path.parent.mkdir()
    path.write_bytes(PROGRAM)
    sources = (path.parent, table(tmp_path / "a" / "test.parquet", bytes=PROGRAM))
    for images in map(load_images, sources):
        assert "img" not in images._repr_html_()
        with pytest.raises(BadImage, match=r"test row 0.*its format is unknown \(\d+ bytes\); expected PNG, JPEG"):
            images.images()
    with pytest.raises(BadImage, match="x.png is not a readable image"):
        sampling._primes(tiny, str(path), "test", 1)
    classifier = ImageGPTForImageClassification(tiny.config)
    torch.nn.init.ones_(classifier.score.weight)
    classifier.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert cli.main(["classify", str(tmp_path / "model"), str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"igpt-lab: {path} is not a readable image")


@pytest.mark.filterwarnings("ignore:IM image format")
def test_formats_are_read_as_pillow_reads_them_or_refused():
    Image.init()
    tried = []
    for form in sorted(Image.SAVE):
        try:
            data = encoded(form)
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except Exception:  # not every format holds every picture, or is read again
            continue
        tried.append(form)
        if form in (*formats(), "MPO"):
            np.testing.assert_array_equal(np.asarray(decode(data, "x")), np.asarray(image))
        else:
            with pytest.raises(BadImage, match="x is not a readable image"):
                decode(data, "x")
    assert {"PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "TGA", "ICO"} <= set(tried)


def test_no_other_file_opens_a_picture():
    for file in Path(igpt_lab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            opens = isinstance(node, ast.Attribute) and node.attr in ("open", "imread")
            if opens and isinstance(node.value, ast.Name) and node.value.id in ("Image", "PIL", "plt"):
                assert file == Path(opening.__file__), f"{file}:{node.lineno}"


def test_a_picture_larger_than_the_limit_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "x.png").write_bytes(encoded())
    with pytest.raises(BadImage, match=r"x.png is too large: Image size \(256 pixels\) exceeds limit of 200"):
        read_image(tmp_path / "x.png")


def test_a_folder_in_place_of_a_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match="is a folder; expected a picture file, such as one of"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^\S*absent.png is not there; expected a picture file$"):
        read_image(tmp_path / "absent.png")


def test_too_little_memory_is_no_damage(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", full)
    with pytest.raises(MemoryError):
        decode(encoded("BMP"), "x")


def test_cielab_is_converted_or_refused():
    """L* of the middle grey 128 is 53.6, and a* and b* of every grey are 0; half its light is far from half its L*."""
    pixels = np.uint8([[[128, 128, 128], [200, 60, 20]]])
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    lab = ImageCms.applyTransform(Image.fromarray(pixels), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    assert np.asarray(lab)[0, 0].tolist() == [round(2.55 * 53.6), 0, 0]
    buffer = io.BytesIO()
    lab.save(buffer, "TIFF")
    assert abs(np.asarray(decode(buffer.getvalue(), "x")).astype(int) - pixels).max() <= 3
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF", icc_profile=profile)
    with pytest.raises(BadImage, match="x: an image in CIELab that says mode RGB; convert it to RGB"):
        decode(buffer.getvalue(), "x")


@pytest.mark.skipif("JPEG2000" not in formats(), reason="Pillow was built without JPEG 2000")
def test_cielab_in_jpeg_2000_is_refused():
    data = encoded("JPEG2000")
    srgb, cielab = (b"colr\x01\0\0\0\0\0" + bytes([number]) for number in (16, 14))
    assert data.count(srgb) == 1
    with pytest.raises(BadImage, match="x is a JPEG 2000 picture in CIELab"):
        decode(data.replace(srgb, cielab), "x")


def test_a_picture_is_closed_after_its_header_was_read(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded())
    with open_image(tmp_path / "x.png") as image:
        assert image.size == (16, 16)
    assert image.fp is None


# Paths


def pipe(path: Path) -> str:
    os.mkfifo(path / "pipe.png")
    return "pipe.png"


def link(path: Path) -> str:
    (path / "link.png").symlink_to(path.parent / "outside.png")
    return "link.png"


def linked_folder(path: Path) -> str:
    (path.parent / "folder").mkdir()
    (path.parent / "folder/outside.png").write_bytes(encoded())
    (path / "below").symlink_to(path.parent / "folder")
    return "below/outside.png"


def sparse(path: Path) -> str:
    with open(path / "large.png", "wb") as file:
        file.truncate((1 << 31) + 1)
    return "large.png"


ELSEWHERE = {
    "absolute": (lambda path: str(path.parent / "outside.png"), "leads out of .*expected a file inside"),
    "upwards": (lambda path: "../outside.png", "leads out of"),
    "link": (link, "leads out of"),
    "folder": (linked_folder, "leads out of"),
    "device": (lambda path: "/dev/zero", "leads out of"),
    "pipe": (pipe, "no regular file"),
    "sparse": (sparse, "it has 2,147,483,649 bytes; expected at most 2,147,483,648"),
    "itself": (lambda path: ".", "no regular file"),
    "null": (lambda path: "a\0b.png", "null"),
    "absent": (lambda path: "absent.png", "No such file"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
@pytest.mark.parametrize("saved", [False, True], ids=["parquet", "saved"])
def test_a_path_in_a_table_leads_to_a_file_in_its_folder_alone(case, saved, tmp_path):
    write, message = ELSEWHERE[case]
    (tmp_path / "outside.png").write_bytes(encoded())
    root = tmp_path / "set"
    root.mkdir()
    cell = {"bytes": None, "path": write(root)}
    if saved:
        column = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
        datasets.Dataset.from_dict({"image": [cell]}, features=column).save_to_disk(root)
    else:
        table(root / "test.parquet", **cell)
    images = load_images(root)
    for read in (lambda: images[0], lambda: images.fingerprint):
        with pytest.raises(ValueError, match=f"set test row 0.*cannot be read: .*{message}") as caught:
            read()
        assert not isinstance(caught.value, BadImage) and "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [pipe, lambda path: "../outside.png", lambda path: str(path / "../outside.png")])
def test_a_saved_folder_has_its_tables_inside(write, tmp_path):
    root = tmp_path / "set"
    datasets.Dataset.from_dict({"image": [{"bytes": encoded(), "path": None}]}).save_to_disk(root)
    state = json.loads((root / "state.json").read_text())
    (root / state["_data_files"][0]["filename"]).rename(tmp_path / "outside.png")
    (root / state["_data_files"][0]["filename"]).symlink_to(tmp_path / "outside.png")  # as in the Hub's cache
    assert len(load_images(root)) == 1
    state["_data_files"][0]["filename"] = write(root)
    (root / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="saved by `datasets`: (its path leads out|it is no regular file)"):
        load_images(root)


@pytest.mark.parametrize("name", ["../elsewhere", "..", ".", "", "{elsewhere}", "a/b", "a\0b", 5, None])
@pytest.mark.parametrize("asked", ["train", "its own"])
def test_a_saved_folder_has_its_splits_inside(name, asked, tmp_path):
    """A class that only a split elsewhere has is not read, nor is that split opened where it is asked for."""
    name = name.format(elsewhere=tmp_path / "elsewhere") if isinstance(name, str) else name
    for folder, word in (("set/train", "cat"), ("elsewhere", "secret")):
        cells = {"image": [{"bytes": encoded(), "path": None}], "label": [word]}
        datasets.Dataset.from_dict(cells).save_to_disk(tmp_path / folder)
    (tmp_path / "set/dataset_dict.json").write_text(json.dumps({"splits": ["train", name]}))
    with pytest.raises(ValueError, match="set cannot be read as a folder saved by `datasets`: a split is .*expected a"):
        load_images(tmp_path / "set", "train" if asked == "train" else str(name) or "train")  # "" is refused before


@pytest.mark.parametrize("path", ["a/x.png", "{root}/a/x.png", "a/../b.png"])
def test_a_path_in_a_table_may_name_any_file_of_its_folder(path, tmp_path):
    root = tmp_path / "set"
    (root / "a").mkdir(parents=True)
    (root / "a/x.png").write_bytes(encoded())
    (root / "b.png").symlink_to(root / "a/x.png")
    table(root / "test.parquet", path=path.format(root=root))
    (tmp_path / "linked").symlink_to(root)
    for folder in (root, tmp_path / "linked", root / "test.parquet"):
        np.testing.assert_array_equal(np.asarray(load_images(folder)[0]), PIXELS)


def test_a_folder_of_links_is_the_users_own(tmp_path):
    (tmp_path / "outside.png").write_bytes(encoded())
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set/cat/x.png").symlink_to(tmp_path / "outside.png")
    np.testing.assert_array_equal(np.asarray(load_images(tmp_path / "set")[0]), PIXELS)


def test_a_key_of_an_object_store_leads_nowhere_else(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("x.png", "set/x.png"):
        (tmp_path / name).write_bytes(name.encode())
    root = Remote(fs.LocalFileSystem(), str(tmp_path / "set"), "file://")
    assert read_inside(root, "x.png") == b"set/x.png"
    for path in ("../x.png", "a/../../x.png", str(tmp_path / "x.png")):
        with pytest.raises(ValueError, match="leads out of"):
            read_inside(root, path)


@pytest.mark.parametrize("cell", ["words", 5, [1, 2]])
def test_a_cell_that_holds_no_picture_is_named(cell, tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": cell}]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x test row 0 is a (str|int|list); expected an encoded picture"):
        load_images(tmp_path / "x.parquet").images()


def test_an_empty_cell_is_a_bad_image(tmp_path):
    with pytest.raises(BadImage, match=r"x test row 0 is not a readable image.*\(0 bytes\)"):
        load_images(table(tmp_path / "x.parquet")).images()


# What is decoded is what was digested


def change(path: Path) -> None:
    path.write_bytes(encoded(pixels=255 - PIXELS))


def test_an_image_that_changes_after_it_was_read_is_refused(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded())
    images = load_images(tmp_path)
    part = images.select([1])
    before = images.fingerprint
    change(tmp_path / "b.png")
    assert images.images([0])
    for read in (lambda: images[1], lambda: part[0], lambda: part.fingerprint, lambda: images.select([1, 0])[0]):
        with pytest.raises(ValueError, match=r"row 1 \(b.png\) has changed since it was first read") as caught:
            read()
        assert not isinstance(caught.value, BadImage)
    assert load_images(tmp_path).fingerprint != before
