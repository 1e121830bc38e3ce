"""Fashion-MNIST's own files -> the bundled image set `fashion-mini`, byte for byte.

    python -m igpt_lab.bundled.make_fashion              write fashion-mini/train.parquet and test.parquet
    python -m igpt_lab.bundled.make_fashion --check      make them in memory and compare
    python -m igpt_lab.bundled.make_fashion --full OUT   all 60,000 and 10,000 images, in the official order

The four idx files are those of https://github.com/zalandoresearch/fashion-mnist, which Debian's package
`dataset-fashion-mnist` installs; their SHA-256 is checked. The same bytes need the pillow and pyarrow of
requirements.lock; other versions give the same rows.
"""

import argparse
import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from igpt_lab.core.provenance import atomic_write, digest
from igpt_lab.images.opening import open_image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
OFFICIAL = {"train": "train", "test": "t10k"}  # our split: how the official files' names begin
PER_CLASS = {"train": 600, "test": 400}
NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SEED = 2017
FOLDER = Path(__file__).parent / "fashion-mini"


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes of a gzipped idx file after its header, as uint8; ValueError when it is not the official file."""
    if not path.is_file():
        raise ValueError(f"no {path}; install Debian's dataset-fashion-mnist or give --source FOLDER with {[*SHA256]}")
    if (actual := digest(path)) != SHA256[path.name]:
        raise ValueError(f"{path} has SHA-256 {actual}; the official file has {SHA256[path.name]}")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def official(source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 28, 28) in [0, 255] and labels uint8 (N,) in [0, 9], in the official order."""
    images = read_idx(source / f"{OFFICIAL[split]}-images-idx3-ubyte.gz", 16)
    return images.reshape(-1, 28, 28), read_idx(source / f"{OFFICIAL[split]}-labels-idx1-ubyte.gz", 8)


def subset(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Rows (per_class * 10,) drawn without replacement, as many of each class, in a shuffled order."""
    generator = np.random.default_rng(SEED)
    rows = [generator.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in range(len(NAMES))]
    return generator.permutation(np.concatenate(rows))


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W) greys -> a PNG file without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def parquet(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> bytes:
    """The chosen rows as a Parquet file that `datasets` reads as Image, ClassLabel and the row in the official file."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(NAMES), "_type": "ClassLabel"},
        "source_index": {"dtype": "int64", "_type": "Value"},
    }
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table(
        {
            "image": pa.array([{"bytes": png(images[row]), "path": f"{row:05d}.png"} for row in rows], kind),
            "label": pa.array(labels[rows].astype(np.int64)),
            "source_index": pa.array(rows.astype(np.int64)),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = pa.BufferOutputStream()
    # PNG bytes do not shrink further, and without a codec the file does not depend on the codec's version.
    pq.write_table(table, sink, compression="none", use_dictionary=False, version="2.6", row_group_size=1000)
    return sink.getvalue().to_pybytes()


def build(source: Path, split: str, *, full: bool = False) -> bytes:
    """The Parquet file of one split: the subset, or all of it in the official order."""
    images, labels = official(source, split)
    return parquet(images, labels, np.arange(len(labels)) if full else subset(labels, PER_CLASS[split]))


def check(path: Path, expected: bytes) -> str:
    """'' when the file holds these bytes, else what differs."""
    if not path.is_file():
        return "absent"
    if path.read_bytes() == expected:
        return ""
    shipped, made = pq.read_table(path, use_threads=False), pq.read_table(pa.BufferReader(expected), use_threads=False)
    if shipped.drop_columns("image") != made.drop_columns("image"):
        return "other rows"
    pairs = zip(shipped["image"].to_pylist(), made["image"].to_pylist(), strict=True)
    same = all(_pixels(one) == _pixels(other) for one, other in pairs)
    return "the same images and labels in other bytes (other versions?)" if same else "other images"


def _pixels(cell: dict) -> bytes:
    return open_image(cell["bytes"]).tobytes()


def main() -> int:
    """The command; returns 1 when --check finds a difference or the source is not the official one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help=f"folder with the four idx files ({SOURCE})")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--full", type=Path, metavar="OUT", help="folder for all images, in the official order")
    options = parser.parse_args()
    wrong, folder = False, options.full or FOLDER
    for split in OFFICIAL:
        path = folder / f"{split}.parquet"
        try:
            data = build(options.source, split, full=options.full is not None)
        except ValueError as error:
            print(f"make_fashion: {error}", file=sys.stderr)
            return 1
        if options.check:
            difference = check(path, data)
            wrong |= bool(difference)
        else:
            difference = ""
            atomic_write(path, data)
        print(f"{digest(data)}  {path}  {len(data):,} bytes  {difference}".rstrip())
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
