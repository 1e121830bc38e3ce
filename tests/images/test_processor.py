"""Tokens against transformers' own processors, resizes and conversions against Pillow's, palettes by hand."""

import io
import itertools
import json
import pickle
import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from PIL import Image
from transformers_peer import few, transformers

from igpt_lab.core.hub import CheckpointError
from igpt_lab.images.palette import fit_palette
from igpt_lab.images.processor import ImageGPTImageProcessor, ImageGPTImageProcessorPil, to_rgb

GENERATOR = np.random.default_rng(0)
PALETTE = GENERATOR.uniform(-1, 1, (40, 3)).astype(np.float32)
BOTH = pytest.mark.parametrize("cls", [ImageGPTImageProcessorPil, ImageGPTImageProcessor])


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def transformers_torch_class():
    """transformers' class with torch, or the test is skipped."""
    pytest.importorskip("torchvision", reason="torchvision, which transformers' class needs, is not installed")
    return transformers().ImageGPTImageProcessor


# transformers


@st.composite
def palettes(draw):
    """(V, 3) as an array or lists; many with centres that lie equally far from some colour, or twice in the palette."""
    colours, seed = draw(st.sampled_from([1, 2, 7, 40, 200])), draw(st.integers(0, 99))
    generator = np.random.default_rng(seed)
    values = {
        "any": generator.uniform(-1, 1, (colours, 3)),
        "levels": generator.integers(0, 256, (colours, 3)) / 127.5 - 1,
        "few levels": generator.integers(0, 16, (colours, 3)) * 17 / 127.5 - 1,
        "twice": generator.choice([-1, -0.5, 0, 0.5, 1], (colours, 3)),
    }[draw(st.sampled_from(["any", "levels", "few levels", "twice"]))]
    return draw(st.sampled_from([values, values.astype(np.float32), values.tolist()]))


@st.composite
def calls(draw):
    """(arguments, images): with or without a resize, scaled as usual or otherwise."""
    height, width, seed = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 10**6))
    side = st.integers(1, 90)
    shape = st.just((height, width)) | st.tuples(side, side)
    images = [Image.fromarray(noise(*draw(shape), 3, seed=seed + i)) for i in range(draw(st.integers(1, 3)))]
    arguments = {"size": {"height": height, "width": width}, "resample": draw(st.sampled_from([0, 2, 3]))}
    other = {
        "do_rescale": st.booleans(),
        "do_normalize": st.booleans(),
        "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5]),
        "image_mean": st.sampled_from([0.5, [0.5, 0.4, 0.3]]),
        "image_std": st.sampled_from([0.5, [0.2, 0.5, 0.6]]),
    }
    return arguments | draw(st.fixed_dictionaries({}, optional=other)), images


@few
@given(palettes(), calls())
def test_same_ids_as_transformers_class_with_pillow(palette, call):
    arguments, images = call
    ours = ImageGPTImageProcessorPil(palette, **arguments)
    theirs = transformers().ImageGPTImageProcessorPil(clusters=palette, **arguments)
    np.testing.assert_array_equal(ours(images)["input_ids"], theirs(images)["input_ids"])
    pixels = [it(images, do_color_quantize=False, return_tensors="np")["pixel_values"] for it in (ours, theirs)]
    np.testing.assert_array_equal(*pixels)
    assert pixels[0].dtype == pixels[1].dtype


@few
@given(palettes(), calls())
def test_same_ids_as_transformers_class_with_torch(palette, call):
    arguments, images = call
    if not (arguments.get("do_rescale", True) or arguments.get("do_normalize", True)):
        arguments["do_normalize"] = True  # without either, transformers rounds its palette to 8 bits too
    ours = ImageGPTImageProcessor(palette, **arguments)
    theirs = transformers_torch_class()(clusters=palette, **arguments)
    got, expected = ours(images, return_tensors="pt").input_ids, theirs(images, return_tensors="pt").input_ids
    assert got.dtype == expected.dtype and got.shape == expected.shape
    resized = any((image.height, image.width) != tuple(arguments["size"].values()) for image in images)
    assert (got != expected).sum() <= (got.numel() // 1000 if resized else 0)


def test_same_ids_as_transformers_on_many_colours():
    """As many pixels as 500 images of CIFAR-10, of which a few always lie between two of 512 centres."""
    palette, images = np.random.default_rng(1).uniform(-1, 1, (512, 3)), noise(20, 160, 160, 3)
    for form in (palette, palette.astype(np.float32)):
        theirs = transformers().ImageGPTImageProcessorPil(clusters=form, size={"height": 160, "width": 160})
        expected = np.concatenate([theirs(image)["input_ids"] for image in images])
        np.testing.assert_array_equal(ImageGPTImageProcessorPil(form, 160).encode(images), expected)


@BOTH
def test_returns_what_transformers_returns(cls):
    images = [Image.fromarray(noise(5, 6, 3, seed=i)) for i in range(2)]
    theirs = transformers().ImageGPTImageProcessorPil(clusters=PALETTE, size={"height": 4, "width": 4})
    ours = cls(PALETTE, {"height": 4, "width": 4})
    for name, more in (("input_ids", {}), ("pixel_values", {"do_color_quantize": False})):
        for kind in ("pt", "np"):
            for one_or_more in (images, images[0]):
                got, expected = (it(one_or_more, return_tensors=kind, **more) for it in (ours, theirs))
                assert list(got) == list(expected) == [name]
                assert type(got[name]) is type(expected[name])
                assert (got[name].shape, got[name].dtype) == (expected[name].shape, expected[name].dtype)
        rows = ours(images, **more)[name]
        assert isinstance(rows, list) and len(rows) == 2
        assert type(rows[0]) is (np.ndarray if cls is ImageGPTImageProcessorPil else torch.Tensor)
        assert rows[0].shape == theirs(images, **more)[name][0].shape
    batch = ours.preprocess(images=images, return_tensors="pt")
    assert batch.input_ids is batch["input_ids"] and batch.to("meta").input_ids.is_meta
    with pytest.raises(AttributeError, match="no 'pixel_values' here, only input_ids"):
        batch.pixel_values  # noqa: B018


@BOTH
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_without_conversion_an_image_that_is_not_rgb_is_an_error_as_in_transformers(cls, mode):
    image = Image.fromarray(noise(9, 5, 4)).convert(mode)
    theirs = transformers().ImageGPTImageProcessorPil(clusters=PALETTE, size={"height": 4, "width": 4})
    for one in (image, np.asarray(image)):
        if mode == "RGB":
            np.testing.assert_array_equal(
                cls(PALETTE, 4, do_convert_rgb=False).encode(one), cls(PALETTE, 4).encode(one)
            )
            continue
        with pytest.raises(ValueError):
            theirs(one, do_convert_rgb=False)
        with pytest.raises(ValueError, match="with do_convert_rgb=False; expected RGB"):
            cls(PALETTE, 4)(one, do_convert_rgb=False)


def test_a_file_says_that_a_processor_does_not_convert_to_both(tmp_path):
    port = transformers().ImageGPTImageProcessorPil
    for asked, of_theirs in ((False, False), (True, None)):
        ImageGPTImageProcessorPil(PALETTE, 4, do_convert_rgb=asked).save_pretrained(tmp_path)
        assert ImageGPTImageProcessorPil.from_pretrained(tmp_path).do_convert_rgb is asked
        assert port.from_pretrained(tmp_path).do_convert_rgb is of_theirs
    assert "do_convert_rgb" not in ImageGPTImageProcessorPil(PALETTE, 4).arguments()


@BOTH
def test_arguments_of_a_call_change_that_call_only(cls):
    processor, image = cls(PALETTE, 4), Image.fromarray(noise(9, 5, 3))
    plain = processor(image, return_tensors="np").input_ids
    for changes in ({"size": 3}, {"clusters": PALETTE[::-1]}, {"do_resize": False}, {"crop": "center"},
                    {"resample": 0}, {"image_mean": 0.2}, {"image_std": [0.1, 0.2, 0.3]}, {"do_rescale": False},
                    {"rescale_factor": 0.01}, {"do_normalize": False}):  # fmt: skip
        other = cls(**processor.arguments() | changes)
        changed = processor(image, return_tensors="np", **changes).input_ids
        np.testing.assert_array_equal(changed, other(image, return_tensors="np").input_ids)
        assert changed.shape != plain.shape or (changed != plain).any(), changes
        np.testing.assert_array_equal(processor(image, return_tensors="np").input_ids, plain)
    with pytest.raises(TypeError, match="do_rezise"):
        processor(image, do_rezise=False)


@BOTH
@pytest.mark.parametrize("again", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize(
    "changes",
    [{"clusters": PALETTE[::-1]}, {"image_mean": [0.2, 0.3, 0.4]}, {"image_std": [0.1, 0.2, 0.3]}, {"do_resize": False},
     {"do_rescale": False, "do_normalize": False}, {"rescale_factor": 0.01}, {"size": {"height": 3, "width": 5}},
     {"resample": 0}, {"do_normalize": False}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_attributes_set_later_count_as_in_transformers(cls, changes, again):
    """The torch class, whose resize and rounding are its own, against a new one with these arguments."""
    image, size = Image.fromarray(noise(9, 5, 3)), {"height": 4, "width": 4}
    ours, theirs = cls(PALETTE, size), transformers().ImageGPTImageProcessorPil(clusters=PALETTE, size=size)
    plain = ours(image, return_tensors="np").input_ids if again else None
    for name, value in changes.items():
        setattr(ours, name, value)
        setattr(theirs, name, value)
    if cls is not ImageGPTImageProcessorPil:
        theirs = cls(**{"clusters": PALETTE, "size": size} | changes)
    got, wanted = (it(image, return_tensors="np").input_ids for it in (ours, theirs))
    np.testing.assert_array_equal(got, wanted)
    assert plain is None or got.shape != plain.shape or (got != plain).any()


@BOTH
def test_attributes_set_later_are_checked(cls):
    processor = cls(PALETTE, 4)
    processor.size = 6
    assert (processor.size, processor.side) == ({"height": 6, "width": 6}, 6)
    wrong = {"size": (0, "expected pixels"), "image_std": (0, "expected no 0"), "clusters": ([[1, 2]], "a palette is")}
    for name, (value, words) in (wrong | {"crop": ("cover", "expected 'squash'")}).items():
        with pytest.raises(ValueError, match=words):
            setattr(processor, name, value)
    with pytest.raises(ValueError, match="read-only"):
        processor.clusters[0] = 0
    assert processor.arguments() | {"clusters": None} == cls(PALETTE, 6).arguments() | {"clusters": None}


def test_a_batch_moves_as_theirs_and_ids_stay_integers():
    images = [Image.fromarray(noise(5, 6, 3))]
    theirs = transformers().ImageGPTImageProcessorPil(clusters=PALETTE, size={"height": 4, "width": 4})
    ours = ImageGPTImageProcessorPil(PALETTE, {"height": 4, "width": 4})
    ways = [(("cpu", torch.float16), {}), ((torch.float16,), {}), ((), {"device": "meta"}), (("meta",), {}),
            (("meta",), {"non_blocking": True})]  # fmt: skip
    for quantised, (where, options) in itertools.product((True, False), ways):
        name = "input_ids" if quantised else "pixel_values"
        got, wanted = (it(images, return_tensors="pt", do_color_quantize=quantised) for it in (ours, theirs))
        assert got.to(*where, **options) is got and wanted.to(*where, **options) is wanted
        assert (got[name].dtype, got[name].device) == (wanted[name].dtype, wanted[name].device)
        assert got[name].is_floating_point() is not quantised
        assert got.to("meta", dtype=torch.float64)[name].is_floating_point() is not quantised


@BOTH
def test_sizes_and_layouts_as_transformers_has_them(cls):
    from transformers.image_utils import ChannelDimension, SizeDict

    for size in (SizeDict(height=3, width=5), {"height": np.int64(3), "width": 5}, (np.int32(3), 5)):
        assert cls(PALETTE, size).size == {"height": 3, "width": 5}
    assert type(cls(PALETTE, np.int64(4)).size["height"]) is int
    processor, images = cls(PALETTE, 4), noise(2, 9, 7, 3)
    for kind in ("np", "pt", None):
        arguments = {"do_color_quantize": False, "return_tensors": kind}
        first = processor(images, **arguments).pixel_values
        last = processor(images, **arguments, data_format=ChannelDimension.LAST).pixel_values
        for one, other in zip(first, last, strict=True):
            np.testing.assert_array_equal(np.moveaxis(np.asarray(one), 0, -1), np.asarray(other))
        assert processor(images, return_tensors=kind, data_format="channels_last").input_ids[0].shape == (16,)


def test_images_of_several_sizes_stay_apart():
    processor = ImageGPTImageProcessorPil(PALETTE, do_resize=False)
    rows = processor([noise(2, 3, 3), [noise(4, 5, 3)], noise(2, 7, 9, 3)]).input_ids
    assert [row.shape for row in rows] == [(6,), (20,), (63,), (63,)]
    with pytest.raises(ValueError, match="several sizes"):
        processor([noise(2, 3, 3), noise(4, 5, 3)], return_tensors="pt")


# Nearest centres


@BOTH
def test_nearest_by_distance_matrix(cls):
    images = noise(3, 7, 7, 3)
    points = images.reshape(3, 49, 1, 3) / 127.5 - 1
    expected = ((points - PALETTE.astype(float)) ** 2).sum(-1).argmin(-1)
    processor = cls(PALETTE, 7)
    for array in (images, torch.from_numpy(images), images.astype(float), images.astype(np.int16)):
        np.testing.assert_array_equal(processor(array, return_tensors="np").input_ids, expected)
    unit = (images / 255).astype(np.float32)
    np.testing.assert_array_equal(processor(unit, return_tensors="np", do_rescale=False).input_ids, expected)
    assert (processor(images, return_tensors="np", clusters=PALETTE[:1]).input_ids == 0).all()


def test_floats_between_levels_count():
    processor = ImageGPTImageProcessorPil([[-1] * 3, [1] * 3], 1)
    assert [processor.encode([np.full((1, 1, 3), x)])[0, 0] for x in (127.4, 127.6)] == [0, 1]


def test_any_number_of_colours():
    """The table's integers hold large palettes, and every colour finds itself."""
    levels = np.stack(np.meshgrid(*[np.arange(0, 256, 7)] * 3), axis=-1).reshape(-1, 3).astype(np.uint8)
    processor = ImageGPTImageProcessorPil(levels / 127.5 - 1, do_resize=False)
    assert len(levels) > 1 << 15
    assert processor.encode(levels[None, None]).tolist() == [list(range(len(levels)))]
    np.testing.assert_array_equal(processor.decode(np.arange(37**2)[None])[0].reshape(-1, 3), levels[: 37**2])


# Sizes


@BOTH
def test_squash_is_one_resize(cls):
    for resample in (0, 2, 3):
        processor, images = cls(PALETTE, {"height": 6, "width": 9}, resample=resample), noise(2, 31, 23, 3)
        if cls is ImageGPTImageProcessorPil:
            expected = np.stack([np.asarray(Image.fromarray(image).resize((9, 6), resample)) for image in images])
            np.testing.assert_array_equal(processor.resize(images), expected)
        else:
            mode = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}[resample]
            options = {} if resample == 0 else {"align_corners": False, "antialias": True}
            floats = torch.from_numpy(images).movedim(3, 1).double()
            expected = F.interpolate(floats, (6, 9), mode=mode, **options).round().clamp(0, 255).movedim(1, 3)
            assert np.abs(processor.resize(images) - expected.numpy()).max() <= 1  # on CPUs torch resizes integers
            same = processor.encode(images) == processor.encode(expected.to(torch.uint8))
            assert same.mean() > 0.98
        assert processor.resize(images).dtype == np.uint8


@BOTH
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (6, 15), (18, 18), (7, 23), (40, 3), (1, 9)])
def test_center_resizes_the_short_side_and_keeps_the_centre(cls, shape):
    side, image = 6, noise(*shape, 3)
    height, width = shape
    long = side * max(shape) // min(shape)
    down, across = (side, long) if height <= width else (long, side)
    whole = cls(PALETTE, {"height": down, "width": across}).resize(image)[0]
    top, left = (down - side) // 2, (across - side) // 2
    got = cls(PALETTE, side, crop="center").resize([Image.fromarray(image)])[0]
    np.testing.assert_array_equal(got, whole[top : top + side, left : left + side])
    assert got.shape == (side, side, 3)


def test_center_is_the_centre_by_hand():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = np.arange(4)[:, None] * 50 + 20
    for cls in (ImageGPTImageProcessorPil, ImageGPTImageProcessor):
        np.testing.assert_array_equal(cls(PALETTE, 4, crop="center").resize(image)[0], image[:, 2:6])
        wide = cls(PALETTE, {"height": 2, "width": 8}, crop="center").resize(image)[0]
        np.testing.assert_array_equal(wide, image[1:3])


def test_floats_are_resized_in_their_range():
    """As 8 bits by Pillow; as they are by torch."""
    levels = noise(2, 9, 12, 3)
    processor = ImageGPTImageProcessorPil(PALETTE, 5)
    for floats in (levels / 255, (levels / 255).astype(np.float32)):
        np.testing.assert_array_equal(processor.encode(floats, do_rescale=False), processor.encode(levels))
    np.testing.assert_array_equal(processor.encode(levels.astype(np.float32)), processor.encode(levels))
    tensor = torch.from_numpy(levels / 255).movedim(3, 1)
    expected = F.interpolate(tensor, (5, 5), mode="bilinear", antialias=True) * 2 - 1
    arguments = {"do_rescale": False, "do_color_quantize": False, "return_tensors": "pt"}
    torch.testing.assert_close(ImageGPTImageProcessor(PALETTE, 5)(tensor, **arguments).pixel_values, expected.float())


# Devices


def test_no_value_of_8_bit_tensors_is_looked_at_on_the_way():
    """On the meta device there is none to look at."""
    processor = ImageGPTImageProcessor(PALETTE, 4)
    for shape in ((2, 3, 9, 7), (2, 9, 7, 3)):
        images = torch.zeros(shape, dtype=torch.uint8, device="meta")
        for crop in ("squash", "center"):
            ids = processor(images, return_tensors="pt", crop=crop).input_ids
            assert ids.is_meta and ids.shape == (2, 16) and ids.dtype == torch.int64
    assert processor([Image.new("RGB", (9, 7))], return_tensors="pt", device="meta").input_ids.is_meta


def test_resize_on_other_devices_rounds_as_integers_do():
    """Accelerators resize floats; the rounded result is that of the CPU's integers in nearly all pixels."""
    images, processor = torch.from_numpy(noise(4, 3, 50, 41)), ImageGPTImageProcessor(PALETTE, 24)
    by_float = F.interpolate(images.float(), (24, 24), mode="bilinear", antialias=True).round().to(torch.uint8)
    assert (processor.encode(images) == processor.encode(by_float)).mean() > 0.98


# Kinds of images


def rgb_of(image: Image.Image) -> list:
    return np.asarray(to_rgb(image)).tolist()


def test_to_rgb():
    greys = np.array([[0, 128, 255]], np.uint8)
    rgb = np.stack([greys] * 3, axis=2)
    palette = Image.fromarray(greys).convert("P")
    deep = Image.fromarray(greys.astype(np.uint16) * 257)
    assert deep.mode.startswith("I;16")
    modes = [Image.fromarray(greys), Image.fromarray(rgb), palette, deep, deep.convert("I")]
    for image in modes:
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), rgb)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(greys > 99)))[0, :, 0], [0, 255, 255])
    deep = Image.fromarray(np.array([[128, 129, 65535]], np.uint16))
    assert np.asarray(to_rgb(deep))[0, :, 0].tolist() == [0, 1, 255]
    half = np.dstack([rgb, np.array([[0, 255, 128]], np.uint8)])  # clear black, solid grey, half white
    for image in (Image.fromarray(half), Image.fromarray(half[..., 2:]).convert("RGBA")):
        np.testing.assert_array_equal(np.asarray(to_rgb(image))[0, :, 0], [255, 128, 255])
    turned = Image.fromarray(rgb)
    turned.getexif()[274] = 6  # the camera lay on its side
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=turned.getexif())
    assert to_rgb(Image.open(buffer)).size == (1, 3)
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(Image.new("F", (2, 2)))


def test_modes_by_hand():
    def one(mode, value):
        return rgb_of(Image.new(mode, (1, 1), value))[0][0]

    assert one("L", 7) == [7, 7, 7]
    assert one("1", 1) == [255] * 3
    assert one("RGB", (1, 2, 3)) == one("RGBA", (1, 2, 3, 255)) == [1, 2, 3]
    assert one("RGBA", (1, 2, 3, 0)) == one("LA", (9, 0)) == [255] * 3
    assert one("RGBA", (0, 100, 255, 51)) == [204, 224, 255]  # a fifth of the colour, four fifths of white
    assert one("LA", (9, 255)) == [9, 9, 9]
    assert one("CMYK", (0, 0, 0, 0)) == [255] * 3
    assert one("CMYK", (255, 0, 0, 0)) == [0, 255, 255]
    assert one("I;16", 65535) == one("I", 65535) == [255] * 3
    assert one("I;16", 257 * 100) == one("I", 257 * 100) == [100] * 3
    assert one("I;16", 257 * 100 + 128) == [100] * 3 and one("I;16", 257 * 100 + 129) == [101] * 3
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert rgb_of(palette) == [[[10, 20, 30], [40, 50, 60]]]
    palette.info["transparency"] = 1
    assert rgb_of(palette) == [[[10, 20, 30], [255] * 3]]
    deep, file = np.array([[257 * 9, 257 * 10, 65535, 2571]], np.uint16), io.BytesIO()
    Image.fromarray(deep).save(file, "PNG", transparency=257 * 10)
    saved = Image.open(file)
    assert saved.mode.startswith("I") and saved.info["transparency"] == 2570
    assert rgb_of(saved) == [[[9] * 3, [255] * 3, [255] * 3, [10] * 3]]
    for mode in ("YCbCr", "HSV"):
        image = Image.fromarray(noise(3, 3, 3)).convert(mode)
        assert rgb_of(image) == np.asarray(image.convert("RGB")).tolist()


def test_opaque_is_rgb():
    colours = noise(40, 40, 3)
    opaque = np.dstack([colours, np.full((40, 40), 255, np.uint8)])
    processor = ImageGPTImageProcessorPil(PALETTE, 16)
    expected = processor.encode([Image.fromarray(colours)])
    for image in (Image.fromarray(opaque), opaque, opaque.transpose(2, 0, 1), torch.from_numpy(opaque)):
        np.testing.assert_array_equal(processor.encode([image]), expected)
    clear = np.dstack([colours, np.zeros((40, 40), np.uint8)])
    assert (processor.resize(clear) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    """What each value of the EXIF tag says of rows and columns, spelt out."""
    upright = noise(2, 3, 3)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]  # fmt: skip
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(file, "PNG", exif=exif)
    assert rgb_of(Image.open(file)) == upright.tolist()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused(kind):
    frames, file = [Image.fromarray(noise(8, 8, 3, seed=i)) for i in range(3)], io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    image = Image.open(file)
    with pytest.raises(ValueError, match=r"an image of 3 frames; choose one: image.seek\(number\)"):
        to_rgb(image)
    image.seek(1)
    assert rgb_of(image.copy()) == np.asarray(image.convert("RGB")).tolist()


def test_a_photograph_with_further_pictures_is_the_photograph():
    frames, file = [Image.fromarray(noise(8, 8, 3, seed=i)) for i in range(2)], io.BytesIO()
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    image = Image.open(file)
    assert image.n_frames == 2
    assert rgb_of(image) == np.asarray(Image.open(file).convert("RGB")).tolist()


@BOTH
def test_arrays_in_either_order(cls):
    colours, greys = noise(2, 7, 5, 3), noise(7, 5)
    processor = cls(PALETTE, 4)
    expected = processor.encode([Image.fromarray(colour) for colour in colours])
    first = np.moveaxis(colours, 3, 1)
    for images in (colours, first, list(colours), list(first), [colours], [list(first)], colours.astype(np.int64)):
        np.testing.assert_array_equal(processor.encode(images), expected)
    for images in (torch.from_numpy(colours), torch.from_numpy(first), [torch.from_numpy(array) for array in first]):
        np.testing.assert_array_equal(processor.encode(images), expected)
    expected = processor.encode([Image.fromarray(greys)])
    deep = greys.astype(np.uint16) * 257
    for images in (greys, greys[None], greys[..., None], greys[None, ..., None], torch.from_numpy(greys), deep):
        np.testing.assert_array_equal(processor.encode(images), expected)


def test_a_shape_with_two_readings_is_refused_and_can_be_told():
    processor, image = ImageGPTImageProcessorPil(PALETTE, 3), noise(3, 8, 3)
    readings = {"channels_last": image, "channels_first": image.transpose(1, 2, 0)}
    for array in (image, image[None], torch.from_numpy(image)):
        with pytest.raises(ValueError, match=r"3, 8, 3\): pass input_data_format, 'channels_first' or 'channels_last'"):
            processor(array)
        for layout, pixels in readings.items():
            got = processor(array, input_data_format=layout, return_tensors="np").input_ids
            np.testing.assert_array_equal(got, processor.encode([Image.fromarray(np.ascontiguousarray(pixels))]))
    tokens = processor.encode(noise(2, 3, 3, 3))
    np.testing.assert_array_equal(processor.encode(processor.decode(tokens)), tokens)
    assert processor.resize(noise(4, 4, 3)).shape == processor.resize(noise(3, 4, 4)).shape == (1, 3, 3, 3)


REFUSED = {
    "no images": [],
    "is empty": Image.new("RGB", (0, 3)),
    "floating-point pixels have no known range": Image.new("F", (2, 2)),
    "may have 8 or 16 bits; convert": Image.new("I", (2, 2), 200),
    r"pixels in \[70000, 70000\]; expected 16 bits": Image.new("I", (2, 2), 70000),
    "uint16 pixels of at most 255": np.full((2, 2), 200, np.uint16),
    r"int64 pixels in \[-1, 3\]": np.array([[-1, 3]]),
    r"int64 pixels in \[0, 256\]": np.array([[0, 256]]),
    "pixels of type bool": np.ones((2, 2), bool),
    "pixels of type complex128": np.ones((2, 2), complex),
    "some pixels are NaN": np.array([[np.nan, 3]]),
    "NaN or infinite": np.array([[np.inf, 3]], np.float16),
    r"with do_rescale=True expected \[0, 255\]": np.array([[0, 300.0]]),
    r"\[-1, 1\]; with do_rescale=True": np.array([[-1, 1.0]]),
    "pass do_rescale=False": np.array([[0, 0.5]]),
    "float64 pixels of 4 channels": np.full((2, 2, 4), 9.0),
    r"shape \(5,\)": np.zeros(5, np.uint8),
    r"shape \(0, 4, 3\)": np.zeros((0, 4, 3), np.uint8),
    r"shape \(1, 2, 5, 6\) has no 1, 3 or 4 channels": np.zeros((1, 2, 5, 6), np.uint8),
}


@pytest.mark.parametrize("message", REFUSED)
@BOTH
def test_refused_in_one_line(cls, message):
    with pytest.raises(ValueError, match=message) as refused:
        cls(PALETTE, 4)(REFUSED[message])
    assert "\n" not in str(refused.value)


@BOTH
def test_a_palette_of_levels_is_refused(cls):
    levels = np.float32([[0, 0, 0], [128, 128, 128], [255, 255, 255]])
    for palette in (levels, levels.tolist(), levels / 64):
        with pytest.raises(ValueError, match=r"a palette from 0 to .*; expected -1 to 1, where a level of 0 to 255 is"):
            cls(palette, 4)
    unscaled = cls(levels, 4, do_rescale=False, do_normalize=False)  # there levels are what pixels are compared with
    assert unscaled.encode(levels.astype(np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2))[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="a palette from 0 to 255; expected -1 to 1"):
        unscaled.decode(np.zeros((1, 16), int))
    wide = cls(np.float32([[-3, -3, -3], [3, 3, 3]]), 2, image_std=1 / 6)  # scaled pixels are in [-3, 3]
    assert wide.encode([Image.new("RGB", (2, 2), "white")]).tolist() == [[1] * 4]


@BOTH
def test_an_iterator_gives_what_a_list_gives_and_no_image_is_held(cls):
    processor = cls(PALETTE, 4)
    made, alive = [], []

    def decoded():
        for seed in range(9):
            alive.append(sum(image() is not None for image in made))
            image = Image.fromarray(noise(9, 7 + seed, 3, seed=seed))
            made.append(weakref.ref(image))
            yield image
            del image

    expected = processor.encode([Image.fromarray(noise(9, 7 + seed, 3, seed=seed)) for seed in range(9)])
    np.testing.assert_array_equal(processor.encode(decoded()), expected)
    assert alive == [0] * 9
    with pytest.raises(ValueError, match="no images; expected at least one"):
        processor.encode(iter(()))


@BOTH
def test_other_refusals(cls):
    processor = cls(PALETTE, 4)
    with pytest.raises(ValueError, match=r"\[0, 2\]; to resize with do_rescale=False expected \[0, 1\]"):
        ImageGPTImageProcessorPil(PALETTE, 4)(np.array([[0, 2.0]]), do_rescale=False)
    for wrong in ("photo.png", [[1, 2], [3, 4]]):
        with pytest.raises(TypeError, match="expected Pillow images, numpy arrays or torch tensors; got (str|int)"):
            processor(wrong)
    for message, arguments in {
        "crop='centre'; expected 'squash'": {"crop": "centre"},
        "size={'shortest_edge': 4}; expected": {"size": {"shortest_edge": 4}},
        "size=0; expected": {"size": 0},
        "size=True; expected": {"size": True},
        "size=.4, False.; expected": {"size": (4, False)},
        "data_format='HWC'; expected 'channels_first'": {"data_format": "HWC"},
        "image_mean=\\[1, 2\\]; expected": {"image_mean": [1, 2]},
        "image_std is .0.0, .*; it divides": {"image_std": 0},
        "a palette is \\(colours, 3\\)": {"clusters": np.zeros((3, 4))},
        "return_tensors='tf'": {"return_tensors": "tf"},
        "input_data_format='CHW'": {"input_data_format": "CHW"},
    }.items():
        with pytest.raises(ValueError, match=message):
            processor(noise(5, 6, 3), **arguments)
    without = cls(size=4)
    assert without(noise(5, 6, 3), do_color_quantize=False).pixel_values[0].shape == (3, 4, 4)
    for use in (without, without.encode, lambda _: without.decode(np.zeros((1, 16), int))):
        with pytest.raises(ValueError, match="a palette is needed: give `clusters`"):
            use(noise(5, 6, 3))
    with pytest.raises(ValueError, match="resample LANCZOS is not in torch; use ImageGPTImageProcessorPil"):
        ImageGPTImageProcessor(PALETTE, 4, resample=1)(noise(5, 6, 3))
    with pytest.raises(ValueError, match="4 x 5 pixels are not square"):
        _ = cls(PALETTE, {"height": 4, "width": 5}).side


# Files


@BOTH
def test_files_go_to_transformers_and_back(cls, tmp_path):
    image = Image.fromarray(noise(9, 7, 3))
    mine = cls(PALETTE, 5, resample=3, image_std=[0.5, 0.4, 0.5], crop="center")
    mine.save_pretrained(tmp_path / "mine")
    theirs = transformers().ImageGPTImageProcessorPil.from_pretrained(tmp_path / "mine")
    square = image.resize((5, 5))
    expected = ImageGPTImageProcessorPil.from_pretrained(tmp_path / "mine").encode([square])
    np.testing.assert_array_equal(theirs(square)["input_ids"], expected)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("mine", "theirs"):
        again = cls.from_pretrained(tmp_path / folder)
        assert repr(again.arguments()) == repr(mine.arguments() | {"clusters": PALETTE.astype(float)})
        np.testing.assert_array_equal(again.clusters, PALETTE)
        assert again.clusters.dtype == np.float32
        np.testing.assert_array_equal(again.encode([image]), mine.encode([image]))
    assert cls.from_pretrained(tmp_path / "mine", crop="squash", size=3).arguments()["crop"] == "squash"


@BOTH
def test_old_new_and_bad_files(cls, tmp_path):
    file, image = tmp_path / "preprocessor_config.json", Image.fromarray(noise(9, 7, 3))
    expected = cls(PALETTE, 7).encode([image])
    clusters = {"clusters": PALETTE.tolist(), "resample": 2, "do_normalize": True, "do_resize": True}
    for values in (
        {"feature_extractor_type": "ImageGPTFeatureExtractor", "size": 7},
        {"image_processor_type": "ImageGPTImageProcessor", "size": {"height": 7, "width": 7}},
        {"image_processor_type": "ImageGPTImageProcessorPil", "size": {"height": 7, "width": 7}, "do_rescale": None},
        {"image_processor_type": "ImageGPTFeatureExtractor", "size": 7, "do_color_quantize": True, "other": [1]},
    ):
        file.write_text(json.dumps(clusters | values))
        processor = cls.from_pretrained(tmp_path, revision="main")
        assert (processor.side, processor.size, processor.crop) == (7, {"height": 7, "width": 7}, "squash")
        np.testing.assert_array_equal(processor.encode([image]), expected)
    file.write_text(json.dumps({"size": 7}))
    with pytest.raises(CheckpointError, match="preprocessor_config.json needs `clusters`"):
        cls.from_pretrained(tmp_path)
    for changes in ({"clusters": PALETTE}, {"do_color_quantize": False}):
        assert cls.from_pretrained(tmp_path, **changes).side == 7
    for message, broken in {"a palette is": {"clusters": [[1, 2]]}, "size='7'": {"size": "7"}}.items():
        file.write_text(json.dumps(clusters | broken))
        with pytest.raises(CheckpointError, match=f"preprocessor_config.json: {message}"):
            cls.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="no preprocessor_config.json"):
        cls.from_pretrained(tmp_path)


@BOTH
def test_a_pickle_is_small_and_whole(cls):
    processor, images = cls(PALETTE, 7, crop="center"), noise(2, 9, 12, 3)
    tokens = processor.encode(images)
    pickled = pickle.dumps(processor)
    assert len(pickled) < 10_000
    np.testing.assert_array_equal(pickle.loads(pickled).encode(images), tokens)


# Back, and palettes


@BOTH
def test_decode_by_hand(cls):
    processor = cls([[-1, 0, 1], [0.5, -0.5, 0]], 2)
    for tokens in (np.array([[0, 1, 1, 0]]), torch.tensor([[0, 1, 1, 0]])):
        image = processor.decode(tokens)
        assert image.shape == (1, 2, 2, 3) and image.dtype == np.uint8
        assert image[0, 0].tolist() == [[0, 128, 255], [191, 64, 128]]
    assert cls([[0] * 3], {"height": 2, "width": 3}).decode(np.zeros((4, 6), int)).shape == (4, 2, 3, 3)
    for worst, tokens in ((2, [0, 1, 2, 0]), (-1, [0, -1, 1, 0])):
        with pytest.raises(ValueError, match=f"token {worst} does not lie in this palette of 2 colours"):
            processor.decode(np.array([tokens]))


@BOTH
def test_tokens_that_make_no_image_are_refused(cls):
    processor = cls(PALETTE, {"height": 2, "width": 3})
    assert processor.decode(np.zeros((2, 9), np.uint8)).shape == (2, 3, 3, 3)
    for tokens, words in [
        (np.zeros(6, int), r"tokens are int64 \(6,\); expected integers \(images, tokens per image\)"),
        (np.zeros((1, 2, 3), int), r"tokens are int64 \(1, 2, 3\)"),
        (np.zeros((1, 6)), r"tokens are float64 \(1, 6\); expected integers"),
        (torch.zeros(1, 6), r"tokens are float32 \(1, 6\)"),
        (np.zeros((1, 7), int), "7 tokens per image make neither a square nor an image of {'height': 2, 'width': 3}"),
        (np.zeros((1, 0), int), "0 tokens per image make neither a square"),
    ]:
        with pytest.raises(ValueError, match=words):
            processor.decode(tokens)


def test_palette_of_separate_greys():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, :2], images[1, 0] = 254, 100
    images[1, 1] = 102  # 101 lies between the two
    greys = np.rint(127.5 * (fit_palette(images, 3, seed=1) + 1))
    np.testing.assert_array_equal(greys, [[0] * 3, [101] * 3, [254] * 3])
    with pytest.raises(ValueError, match="4 distinct colours"):
        fit_palette(images, 5)
    with pytest.raises(ValueError, match=r"uint8 \(N, H, W, 3\)"):
        fit_palette(images / 255, 3)


def test_palette_of_more_colours_than_are_clustered(monkeypatch):
    monkeypatch.setattr("igpt_lab.images.palette.DISTINCT", 50)
    reds, blues = np.zeros((2, 1, 20, 20, 3), np.uint8)
    reds[..., 0], blues[..., 2] = [np.arange(400).reshape(20, 20) % 40 + 200] * 2
    palette = fit_palette(np.concatenate([reds, blues]), 2)
    assert abs(127.5 * (palette + 1) - [[0, 0, 219.5], [219.5, 0, 0]]).max() < 8
    np.testing.assert_array_equal(fit_palette(np.concatenate([reds, blues]), 2), palette)
