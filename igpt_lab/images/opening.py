"""Pictures from strangers: opened by formats that run nothing, and read only from inside the folder of their set.

No other file of the package opens a picture.
"""

from __future__ import annotations

import functools
import io
import os
import re
import stat
from pathlib import Path, PurePath

from PIL import Image, UnidentifiedImageError

from igpt_lab.core.arguments import local
from igpt_lab.core.storage import Place, Remote

# Pillow decodes these in its own process; others start programs (EPS), load plugins, or are not images.
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
LARGEST = 1 << 31  # bytes of a file: more than Pillow's limit of pixels takes uncompressed
OUTSIDE = "its path leads out of {}; expected a file inside: copy it there"
JP2_LAB = re.compile(rb"colr\x01..\0\0\0\x0e", re.DOTALL)  # JPEG 2000 part 1, I.5.3.3; Pillow reads it as RGB


class BadImage(ValueError):
    """The content of an image is damaged or no picture: it will be so the next time, where a read error may pass."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(source: bytes | Path) -> Image.Image:
    """A picture whose header alone is read, for a `with` block; raises what Pillow does."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats())


def decode(data: bytes, name: str) -> Image.Image:
    """An encoded picture -> mode RGB, upright, see `to_rgb`; BadImage, which begins with `name`, where it is none."""
    from igpt_lab.images.processor.pixels import to_rgb  # with torch, which a reader of headers does without

    try:
        image = open_image(data)
        image.load()
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"{name} is too large: {first_line(error)}") from error
    except UnidentifiedImageError as error:
        raise BadImage(
            f"{name} is not a readable image, is it cut short? its format is unknown ({len(data):,} bytes); "
            f"expected {', '.join(formats())}"
        ) from error
    except Exception as error:  # each of Pillow's formats raises classes of its own for a damaged file
        raise BadImage(
            f"{name} is not a readable image, is it cut short? {first_line(error)} ({len(data):,} bytes)"
        ) from error
    if image.format == "JPEG2000" and JP2_LAB.search(data[:4096]):
        raise BadImage(f"{name} is a JPEG 2000 picture in CIELab; convert it to RGB")
    try:
        return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage(f"{name}: {first_line(error)}") from error


def read_image(file: str | Path) -> Image.Image:
    """A picture file that the user named -> mode RGB, see `decode`; FileNotFoundError, or ValueError for no file."""
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; expected a picture file, such as one of {file / '*'}")
    try:
        data = read_named(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is not there; expected a picture file") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return decode(data, str(file))


def read_named(file: str | Path) -> bytes:
    """The content of a file that the user named; OSError where it cannot be read, ValueError where it is no file."""
    return _read_regular(local(file))


def read_inside(root: Place, path: str, *, linked: bool = False) -> bytes:
    """The content of the regular file at `path`, from `root` on; with `linked` a link may lead out of `root`.

    Raises OSError where it cannot be read, and ValueError where it is a device, a pipe or a folder, or lies outside.
    """
    if isinstance(root, Remote):
        if _leads_out(path):
            raise ValueError(OUTSIDE.format(root))
        return (root / path).read_bytes()
    return _read_regular(_placed(root, path, linked=linked))


def inside(root: Path, path: str, *, linked: bool = False) -> Path:
    """The regular file at `path`, as `read_inside` has it; it is not opened, as a pipe would wait."""
    file = _placed(root, path, linked=linked)
    _size_of_regular(file)
    return file


def _placed(root: Path, path: str, *, linked: bool) -> Path:
    """The file at `path`, whatever it is; ValueError where it lies outside."""
    file = root / path if linked else Path(os.path.realpath(root / path))
    if _leads_out(path) if linked else not file.is_relative_to(os.path.realpath(root)):
        raise ValueError(OUTSIDE.format(root))
    return file


def _read_regular(file: Path) -> bytes:
    size = _size_of_regular(file)
    if size > LARGEST:
        raise ValueError(f"it has {size:,} bytes; expected at most {LARGEST:,}")
    return file.read_bytes()


def _size_of_regular(file: Path) -> int:
    """Bytes of a file; ValueError for a pipe, which would wait for its writer, a device or a folder."""
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no regular file")
    return about.st_size


def _leads_out(path: str) -> bool:
    """Does a path lead out of its folder by its words alone?"""
    return path.startswith("/") or ".." in PurePath(path).parts


def first_line(error: Exception | None) -> str:
    """What an error says, without what follows."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
