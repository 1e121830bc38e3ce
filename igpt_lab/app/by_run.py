"""Results by run, which is a model on an image set: the folders that hold them, and the figures of a folder by run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

KEY = {"weights", "palette", "layers", "splits"}  # fields that every key of a feature store has


class Run(NamedTuple):
    """The names of a model and of an image set, '' where nothing says them."""

    model: str
    images: str

    def __str__(self) -> str:
        return " on ".join(filter(None, self)) or "other figures"


STUDY = Run("", "several models")  # of figures that set models beside each other


def folders_of(folder: Path) -> list[Path]:
    """The folder itself where it has figures, else the folders in it that have some, or itself where none has.

    Raises ValueError for a folder that is not there, or is a file.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is a file; expected its folder" if folder.exists() else f"there is no folder {folder}"
        )
    if _has_figures(folder):
        return [folder]
    inside = (path for path in sorted(folder.glob("[!.]*")) if path.is_dir() and not path.is_symlink())
    return [path for path in inside if _has_figures(path)] or [folder]


def _has_figures(folder: Path) -> bool:
    return any(file.with_suffix(".csv").is_file() for file in folder.glob("[!.]*.json"))


def run_of(config: object) -> Run:
    """Whose results a figure has, by its configuration."""
    if not isinstance(config, Mapping):
        return Run("", "")
    models = config.get("models")
    if isinstance(models, list) and len(models) > 1:
        return STUDY
    facts = [config, config.get("store"), *stores_in(config)]
    facts += [{"model": models[0]}] if isinstance(models, list) and models else []
    named = [fact for fact in facts if isinstance(fact, Mapping)]
    return Run(*(next(map(short, _words(named, field)), "") for field in ("model", "images")))


def _words(facts: list[Mapping], field: str) -> Iterator[str]:
    return (fact[field] for fact in facts if isinstance(fact.get(field), str) and fact[field])


def stores_in(config: object) -> Iterator[dict]:
    """Every feature store's key in a configuration."""
    if isinstance(config, Mapping):
        if set(config) >= KEY:
            yield dict(config)
        else:
            for value in config.values():
                yield from stores_in(value)


def short(name: str) -> str:
    """The end of a path or of a Hub name, by which a store calls its model and images too."""
    return Path(name).name or name


def grouped(configs: Mapping[str, object]) -> dict[Run, list[str]]:
    """Names of figures by their run, of their configurations by name; runs in the order in which they come first.

    A figure that names a model alone, or nothing, is of the first run that it may be of.
    """
    runs = {name: run_of(config) for name, config in configs.items()}
    distinct = [run for run in dict.fromkeys(runs.values()) if run != STUDY]
    whole = [run for run in distinct if all(run)] or [run for run in distinct if any(run)]
    groups: dict[Run, list[str]] = {}
    for name, run in runs.items():
        if run != STUDY and not all(run):
            run = next((other for other in whole if _may_be(run, other)), run)
        groups.setdefault(run, []).append(name)
    return groups


def _may_be(run: Run, other: Run) -> bool:
    return all(name in ("", theirs) for name, theirs in zip(run, other, strict=True))


def warning_of(titles: list[str], *, alike: bool = False) -> str:
    """What to be careful about where results of several runs are together, `alike` of one model and image set.

    '' of one run.
    """
    if len(titles) < 2:
        return ""
    of = "all of one model and image set" if alike else "of several models or image sets"
    return f"Results of {len(titles)} runs, {of}: {'; '.join(titles)}. Compare within a run."
