"""A name or a folder -> a model's files on this disk.

A model is bundled with the package (`fashion-xs`), a folder in the layout of Hugging Face's ImageGPT, or a name on the
Hub.
"""

from __future__ import annotations

import json
from pathlib import Path

from igpt_lab.core.arguments import local
from igpt_lab.core.provenance import atomic_write
from igpt_lab.core.values import did_you_mean

BUNDLED = Path(__file__).parents[1] / "bundled"
INDEX = ".index.json"  # behind a weights file's name: the index of its shards
WEIGHTS = ("model.safetensors", "model.safetensors" + INDEX, "pytorch_model.bin", "pytorch_model.bin" + INDEX)

FINDING = ("cache_dir", "force_download", "local_files_only", "subfolder", "token")  # keywords that say where files lie
UNUSED = {  # keywords of transformers' `from_pretrained` that change nothing here
    "trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "weights_only", "resume_download", "proxies", "mirror",
    "use_fast", "backend", "adapter_kwargs", "code_revision", "_from_auto", "_from_pipeline", "_commit_hash",
}  # fmt: skip

LARGEST = 1 << 26  # bytes of a JSON file that is read


class CheckpointError(ValueError, OSError):
    """A source that is not a checkpoint, or one whose content does not fit; the message names the culprit.

    It is an OSError too, as that of transformers.
    """


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def options(asked: dict) -> tuple[dict, dict]:
    """Of keywords as transformers' `from_pretrained` has them: those for `resolve`, and those that are left."""
    finding = {name: asked[name] for name in FINDING if asked.get(name) is not None}
    return finding, {name: value for name, value in asked.items() if name not in {*FINDING, *UNUSED}}


def resolve(
    source: str | Path, *, revision: str | None = None, weights: bool = True, subfolder: str = "", **finding
) -> Path:
    """The local folder of a bundled name, a folder, or (by download) a Hub name `owner/name`.

    `revision` is a branch, a tag or a commit on the Hub; what is local has none. Without `weights` only the Hub's JSON
    files are fetched. `finding`, of which the Hub's client knows more: `cache_dir`, `force_download`,
    `local_files_only`, `token`.
    """
    if not str(source).strip():
        raise CheckpointError(f"the model's name is empty; {_expected()}")
    folder = local(source)
    if str(source) in bundled():
        return BUNDLED / str(source)
    if folder.is_dir():
        return folder / subfolder
    if folder.exists():
        raise CheckpointError(f"{source} is a file; expected a folder with config.json and model.safetensors")
    if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        kinds = ("model*.safetensors", "pytorch_model*.bin") if weights else ()
        return _download(str(source), kinds, subfolder, {"revision": revision} | finding)
    raise CheckpointError(f"there is no model {str(source)!r}; {did_you_mean(source, bundled(), _expected())}")


def _expected() -> str:
    return f"expected a bundled name ({', '.join(bundled())}), a folder, or a Hub name owner/name"


def _download(name: str, kinds: tuple[str, ...], subfolder: str, finding: dict) -> Path:
    """The folder with the JSON files, and the weights of the first of `kinds` that there is."""
    inside = f"{subfolder}/" if subfolder else ""
    try:
        for kind in kinds or ("",):
            patterns = [f"{inside}*.json", *filter(None, [kind and inside + kind])]
            folder = snapshot(name, allow_patterns=patterns, **finding) / subfolder
            if kind and any(folder.glob(kind)):
                break
    except Exception as error:  # the Hub client raises a different class for each way to have no network
        at = f" at revision {finding['revision']!r}" if finding["revision"] else ""
        raise CheckpointError(
            f"there is no model {name!r}{at}: it is neither bundled ({', '.join(bundled())}) nor a folder, and the Hub "
            f"did not give it ({type(error).__name__}). Without a network, put config.json, preprocessor_config.json "
            f"and model.safetensors (or pytorch_model.bin) of {name} into a folder, and give its path"
        ) from error
    return folder


def snapshot(name: str, **options) -> Path:
    """The folder of a repository's files from the Hub, or from its cache: `huggingface_hub.snapshot_download`.

    `options` are its own. It raises a different class for each way to have no network, so a caller catches all.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, **options))


def read_json(path: Path) -> dict:
    """A JSON object from a file; errors name the file."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}")
    if path.stat().st_size > LARGEST:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; expected a JSON file of at most {LARGEST:,}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _without_doubles(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError for a name that comes twice, of which Python's reader would drop the first."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the name {next(name for name in names if names.count(name) > 1)!r} appears twice in an object"
        )
    return value


def write_json(path: Path, value: dict) -> None:
    """A JSON object to a file, whole or absent."""
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
