"""Images that come as tokens, in the .npy files that OpenAI publishes: a name and a split -> tokens and their labels.

A set is `NAME_trX.npy`, `NAME_vaX.npy`, `NAME_teX.npy` and, beside each, the classes in `NAME_trY.npy` and so on.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from igpt_lab.core.arguments import local
from igpt_lab.images.columns import Labels, class_names, fixed

TOKEN_FILE = re.compile(r"(.+)_(?:tr|va|te)X\.npy")
TOKEN_SPLITS = {"train": "tr", "validation": "va", "valid": "va", "val": "va", "dev": "va", "test": "te"}
ROWS = 10_000  # that are looked at together: the arrays stay on the disk


def token_sets(path: Path) -> list[Path]:
    """FOLDER/NAME of the token sets that a path means: of a folder all, else the one it begins, or is a file of."""
    file_name = TOKEN_FILE.fullmatch(path.name)
    if file_name:
        return [path.with_name(file_name[1])] if path.is_file() else []
    folder = path if path.is_dir() else path.parent
    matches = [TOKEN_FILE.fullmatch(file.name) for file in folder.glob("*_??X.npy")]
    names = {match[1] for match in matches if match}
    return [folder / name for name in sorted(names) if path.is_dir() or name == path.name]


def read_tokens(name: str | Path, split: str) -> tuple[str, np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """The set's own name, tokens (N, T) mapped from the disk, labels int64 (N,) or None, and the classes' names.

    Raises ValueError, which names the culprit.
    """
    sets = token_sets(local(name))
    if not sets:
        raise ValueError(f"{name} has no token files; expected NAME_trX.npy, NAME_vaX.npy or NAME_teX.npy")
    if len(sets) > 1:
        raise ValueError(f"{name} has several token sets: {', '.join(map(str, sets))}; give one")
    by_split = {short: sets[0].with_name(f"{sets[0].name}_{short}X.npy") for short in ("tr", "va", "te")}
    if split not in TOKEN_SPLITS or not by_split[TOKEN_SPLITS[split]].is_file():
        there = ", ".join(word for word in ("train", "validation", "test") if by_split[TOKEN_SPLITS[word]].is_file())
        raise ValueError(f"{name} has no split {split!r}; it has {there}")
    file = by_split[TOKEN_SPLITS[split]]
    tokens = mapped(file)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise ValueError(f"{file} is {tokens.dtype} {tokens.shape}; expected integers (images, tokens)")
    labels = {path: _labels_beside(path) for path in by_split.values() if path.is_file()}
    own, present = labels[file], [some for some in labels.values() if some is not None]
    if own is None:
        return sets[0].name, tokens, None, ()
    label_names = class_names(present, str(name))
    return sets[0].name, tokens, fixed(own.numbered(label_names)), label_names


def _labels_beside(tokens: Path) -> Labels | None:
    """The labels in the Y file beside an X file, None where there is none."""
    classes = tokens.with_name(f"{tokens.name.removesuffix('X.npy')}Y.npy")
    return _labels_of(classes, len(mapped(tokens))) if classes.is_file() else None


class Mapped(np.memmap):
    """An array on the disk; ValueError where its file was cut meanwhile, which would end the process."""

    def __getitem__(self, index):
        mapped = self._mmap
        if mapped is not None and mapped.size() < len(mapped):
            raise ValueError(f"{self.filename} was cut to {mapped.size():,} bytes while it is in use; load it again")
        return super().__getitem__(index)


def mapped(path: Path) -> np.ndarray:
    """The array of numbers in a .npy file, mapped from the disk; ValueError, which names the file, for another."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
            begin, size = file.tell(), math.prod(shape) * dtype.itemsize
        whole = all(type(n) is int and n >= 0 for n in shape) and begin + size <= path.stat().st_size
        if not whole or not dtype.itemsize or dtype.hasobject:  # NumPy divides by the size of an item
            raise ValueError(f"{shape} of {dtype}")
        return Mapped(path, dtype, "r", begin, shape, "F" if by_columns else "C")
    except Exception as error:  # NumPy's reader of headers raises many kinds
        raise ValueError(f"{path} cannot be read as a .npy file of numbers, is it cut short?") from error


def _labels_of(path: Path, rows: int) -> Labels:
    """The classes of a Y file: whole numbers (N,), or one-hot rows (N, K), whose columns are all classes."""
    classes = mapped(path)
    if classes.ndim not in (1, 2) or len(classes) != rows or not classes.size or classes.dtype.kind not in "iufb":
        raise ValueError(f"{path} is {classes.dtype} {classes.shape}; expected classes of {rows} images")
    labels = np.empty(rows, np.int64)
    for start in range(0, rows, ROWS):
        some = classes[start : start + ROWS]
        with np.errstate(invalid="ignore"):  # NaN becomes an integer, which differs from it below
            numbers = (some if some.ndim == 1 else some.argmax(axis=1)).astype(np.int64)
        back = numbers if some.ndim == 1 else np.eye(some.shape[1])[numbers]
        wrong = (some != back).reshape(len(some), -1).any(axis=1) | (numbers < 0)
        if wrong.any():
            raise ValueError(f"{path} row {start + wrong.argmax()} names no class: {some[wrong.argmax()]}")
        labels[start : start + len(some)] = numbers
    if classes.ndim == 2:
        return Labels(labels, tuple(range(classes.shape[1])), noted=True)
    distinct, codes = np.unique(labels, return_inverse=True)
    if distinct[-1] >= 1_000_000:
        raise ValueError(f"{path} has the class {distinct[-1]}; expected classes from 0 on")
    return Labels(codes, tuple(distinct.tolist()))
