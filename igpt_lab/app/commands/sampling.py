"""Commands that draw images: from nothing, and below the upper part of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import igpt_lab as lab
from igpt_lab.app.commands.options import DEVICE, IMAGES, MODEL, REVISION, SPLIT, argument, command

DRAWING = (
    argument(
        "--temperature",
        type=float,
        default=1.0,
        help="temperature of the distribution over colours; 0 takes the most probable colour",
    ),
    argument("--top-k", type=int, help="draw among this many most probable colours (default: all)"),
    argument(
        "--top-p", type=float, help="draw among the fewest colours that together reach this probability (default: all)"
    ),
    argument("--seed", type=int, default=0, help="seed of the random numbers, 0 or above"),
    argument(
        "--batch-size", type=int, help="number of images drawn at a time, which changes no image (default: by memory)"
    ),
)
OUT_HELP = "files to write, without their endings"


@command(
    MODEL,
    argument("--count", type=int, default=64, help="number of images"),
    argument("--columns", type=int, default=16, help="columns of the gallery"),
    argument("--scale", type=int, default=4, help="side of an image's pixel in the png, in pixels"),
    *DRAWING,
    argument("--out", default="samples", help=OUT_HELP),
    DEVICE,
    REVISION,
    examples=("fashion-xs", "runs/mine --count 16 --top-p 0.9 --out results/mine/samples"),
)
def sample(
    model: str, count: int, columns: int, scale: int, out: str, device: str | None, revision: str | None,
    **settings: Any,
) -> int:  # fmt: skip
    """Draw images from nothing: a gallery as png, pdf and svg, tokens with their seeds as csv, settings as json."""
    loaded = _on_device(model, device, revision)
    drawn = lab.sample(loaded, count, **settings)
    title = f"{loaded.name}: samples"
    gallery = lab.figures.gallery(loaded.processor.decode(drawn.tokens), columns=columns, scale=scale, title=title)
    return _save_drawn(gallery, out, drawn, loaded, settings)


@command(
    MODEL,
    argument("images", help=f"{IMAGES.help}; or a picture file"),
    SPLIT,
    argument("--limit", type=int, default=16, help="number of images, by a stratified draw with a fixed seed"),
    argument("--keep", type=float, default=0.5, help="upper fraction of the image that is kept, from 0 to 1"),
    argument("--completions", type=int, default=4, help="completions per image"),
    *DRAWING,
    argument("--out", default="completions", help=OUT_HELP),
    DEVICE,
    REVISION,
    examples=("fashion-xs fashion-mini --limit 8", "runs/mine photo.png --keep 0.25 --completions 6"),
)
def complete(
    model: str, images: str, split: str, limit: int, keep: float, completions: int, out: str, device: str | None,
    revision: str | None, **settings: Any,
) -> int:  # fmt: skip
    """Keep the upper part of images and draw the rest several times; files as of `sample`."""
    loaded = _on_device(model, device, revision)
    originals, source = _primes(loaded, images, split, limit)
    drawn = lab.complete(loaded, originals, keep=keep, completions=completions, **settings)
    decode = loaded.processor.decode
    pictures = [decode(originals), [decode(tokens) for tokens in drawn.tokens], decode(originals)]
    title = f"{loaded.name} on {source['images']}: completions"
    gallery = lab.figures.completion_gallery(*pictures, prime_rows=lab.prime_rows(loaded, keep), title=title)
    about = settings | source | {"keep": keep, "completions": completions}
    return _save_drawn(gallery, out, drawn, loaded, about)


def _on_device(model: str, device: str | None, revision: str | None) -> Any:
    """A model with a palette, on the device that was named or on the accelerator where there is one."""
    from igpt_lab.core.devices import best_device

    loaded = lab.load_model(model, revision=revision)
    if loaded.processor is None:
        raise ValueError(f"{model} has no palette (preprocessor_config.json), without which tokens make no image")
    return loaded.to(best_device(device))


def _primes(model: Any, images: str, split: str, limit: int) -> tuple[Any, dict[str, Any]]:
    """Tokens (S, T) of a picture file or of an image set, and what they are."""
    from PIL import Image

    from igpt_lab.images.opening import read_image

    file = Path(images)
    if file.exists() and not file.is_dir() and file.suffix.lower() in Image.registered_extensions():
        return model.processor.encode([read_image(file)]), {"images": file.name}
    source = lab.load_images(images, split, limit=limit)
    tokens = lab.tokenize(source, model.processor, progress=False)
    about = {"images": source.name, "split": split, "index": source.index.tolist()}
    return tokens, about | ({"files": list(source.files)} if any(source.files) else {})


def _save_drawn(gallery: Any, out: str, drawn: Any, model: Any, settings: dict[str, Any]) -> int:
    """Write the figure with tokens, seeds and settings; exit code 130 where drawing was interrupted."""
    config = settings | {"model": model.name, "finished_rows": drawn.rows.ravel().tolist()}
    record = lab.RunRecord(Path(out).name, config, seed=settings["seed"])
    print(*lab.figures.save_figure(gallery, out, data=drawn.table(), record=record), sep="\n")
    return 0 if (drawn.rows == lab.prime_rows(model, 1)).all() else 130
