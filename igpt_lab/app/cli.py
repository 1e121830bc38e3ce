"""Thin commands over the package: extract, check, ablate, loss, pretrain, finetune, sample, reproduce and others."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
import warnings
from dataclasses import MISSING, fields, replace
from pathlib import Path

import igpt_lab as lab
from igpt_lab.app import notebooks
from igpt_lab.core.provenance import atomic_write

SHAPE = {"side": 20, "colours": 32, "layers": 16, "width": 64, "heads": 2}  # of a network that pretrain begins anew


def main(arguments: list[str] | None = None) -> int:
    """Run one command; bad input ends in one line on stderr and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = vars(_parser("".join(arguments[:1])).parse_args(arguments))
    command = options.pop("command")
    try:
        return command(**options) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"igpt-lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"igpt-lab: {str(stopped) or 'stopped'}; what was finished is kept", file=sys.stderr)
        return 130


def extract(
    model: str, images: str, split: list[str], limit: int | None, store: str, random: bool, revision: str | None,
    point: list[str], engine: str, scheduler: str | None, deadline: float | None, part: tuple[int, int] | None,
    **options,
) -> None:  # fmt: skip
    """Pooled features of every layer of a model over an image set, into a feature store."""
    if scheduler and engine != "dask":
        raise ValueError(f"--scheduler {scheduler} is of --engine dask; give both, or neither")
    splits = [lab.load_images(images, name, limit=limit) for name in split or ["train", "test"]]
    loaded = lab.load_model(model, revision=revision, random=random)
    options |= {"store": store, "points": point or ["ln_1"]}
    if engine == "dask":
        options |= {"scheduler": scheduler, "deadline": deadline, "share": part}
        filled = lab.extract_on_cluster(loaded, splits, **options)
    elif part:
        filled = lab.extract_share(loaded, splits, share=part, **options)
    else:
        filled = lab.extract(loaded, splits, **options)
    print(filled.path)


def check(model: str, images: str | None, split: str, device: str | None) -> int:
    """Measure whether a model's features can be trusted; a table of checks, and exit code 1 when one fails."""
    given = None if images is None else lab.load_images(images, split)
    table = lab.check(model, device=device, images=given)
    verdicts = {True: "pass", False: "FAIL"}
    table["passed"] = [verdicts.get(passed, "-") for passed in table.passed]
    measured = [f"{value:.1e}" if value == value else "-" for value in table.measured]
    print(table.assign(measured=measured, allowed=table.allowed.map("{:g}".format)).to_string(index=False))
    return int("FAIL" in set(table.passed))


def ablate(model: str, images: str, limit: int | None, store: str, out: str, revision: str | None, **options) -> None:
    """Probe every layer under every protocol (alignment, point, scaling, solver): a figure, its table, what it says."""
    train, test = (lab.load_images(images, split, limit=limit) for split in ("train", "test"))
    loaded = lab.load_model(model, revision=revision)
    found = lab.ablate_protocol(loaded, train, test, store=store, **options)
    curves = lab.figures.protocol_curves(found.table, found.effects, title=f"{loaded.name} on {train.name}")
    record = lab.RunRecord("protocol", found.to_dict(), seed=0)
    files = lab.figures.save_figure(curves, Path(out) / "protocol", data=found.table, record=record)
    print(found.describe(), *files, sep="\n")


def dynamics(
    models: list[str], images: str, limit: int | None, layers: list[int] | None, final: bool, store: str, out: str,
    name: str | None,
) -> None:  # fmt: skip
    """Probe every checkpoint of one or more pretrainings at every layer: accuracy over the loss, curves over depth."""
    import pandas as pd

    train, test = (lab.load_images(images, split, limit=limit) for split in ("train", "test"))
    runs = {Path(model).name: model for model in models}
    if len(runs) < len(models):
        raise ValueError(f"models {', '.join(models)}: expected folders of different names, which tell them apart")
    if final:
        table = lab.probe_models(runs, train, test, store=store, layers=layers)
        figure = lab.figures.model_comparison(table, title=f"Models on {train.name}")
    else:
        tables = [
            lab.probe_checkpoints(lab.checkpoints_of(folder), train, test, store=store, name=run, layers=layers)
            for run, folder in runs.items()
        ]
        table = pd.concat(tables, ignore_index=True)
        figure = lab.figures.training_dynamics(table, title=f"{', '.join(runs)} on {train.name}")
    about = {"images": train.name, "limit": limit, "models": list(runs)}
    what = "model_comparison" if final else "training_dynamics"
    record = lab.RunRecord(what, about, seed=0)
    files = lab.figures.save_figure(figure, Path(out) / (name or what), data=table, record=record)
    for row in table[table.chosen].itertuples():
        accuracy = f"{row.test_accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]"
        if row.control:
            print(f"{row.model}, {row.control}: {accuracy}")
            continue
        print(f"{row.model}, step {row.step:,}: {row.loss:.4f} nats per token, layer {row.layer} {accuracy}, "
              f"less the last {100 * row.drop:+.1f} points, p = {row.drop_p:.2g}")  # fmt: skip
    print(*files, sep="\n")


def evaluate(model: str, images: str, split: str, limit: int | None, revision: str | None) -> None:
    """A model's loss over the images of a split, start token in front, with its standard error over images."""
    from igpt_lab.models.loading import tokens_of
    from igpt_lab.models.losses import losses_of

    loaded = lab.load_model(model, revision=revision)
    if loaded.config.bidirectional:
        raise ValueError(f"{model} predicts masked pixels, so its loss needs masks: see igpt_lab.masked_pixel_loss")
    tokens = tokens_of(loaded, lab.load_images(images, split, limit=limit), progress=True)
    nats = losses_of(loaded, tokens, progress=True)
    error = nats.std(ddof=1) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
    print(f"{model} on {len(tokens):,} images of {images} {split}: {nats.mean():.4f} nats per token (standard error "
          f"{error:.4f}), {nats.mean() / math.log(2):.4f} bits per pixel ({error / math.log(2):.4f})")  # fmt: skip


def pretrain(images: str, out: str, init: str | None, bert: bool, limit: int | None, **options) -> None:
    """Train an ImageGPT on the train split of an image set; the same command goes on where it stopped."""
    import numpy as np

    from igpt_lab.models.loading import tokens_of
    from igpt_lab.training import parallel

    given = {name: options.pop(name) for name in SHAPE}
    shape = {name: default if given[name] is None else given[name] for name, default in SHAPE.items()}
    side, colours = shape["side"], shape["colours"]
    source, recipe = lab.load_images(images, "train", limit=limit), lab.Recipe(**options)
    with parallel.together():
        if init is not None:
            if bert or any(value is not None for value in given.values()):
                raise ValueError(f"--init {init} brings its shape along; leave out --bert, --{', --'.join(SHAPE)}")
            begun = lab.load_model(init)
            config = replace(begun.config, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            tokens = tokens_of(begun, source)
            print(lab.pretrain(tokens, config, recipe, out, processor=begun.processor, init=begun))
            return
        with parallel.first_alone():
            if not Path(out, "preprocessor_config.json").exists():
                blank = lab.ImageGPTImageProcessorPil(np.zeros((1, 3)), side)
                palette = lab.fit_palette(blank.resize(source.images()), colours)
                lab.ImageGPTImageProcessorPil(palette, side).save_pretrained(out)
        processor = lab.ImageGPTImageProcessorPil.from_pretrained(out)  # as every later call reads it, to the last bit
        config = lab.ImageGPTConfig(
            vocab_size=colours + 1, n_positions=side**2, n_embd=shape["width"], n_layer=shape["layers"],
            n_head=shape["heads"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bidirectional=bert,
        )  # fmt: skip
        print(lab.pretrain(lab.tokenize(source, processor), config, recipe, out, processor=processor))


def finetune(
    model: str, images: str, out: str, limit: int | None, random: bool, device: str | None, revision: str | None,
    **tuning,
) -> None:  # fmt: skip
    """Fine-tune a model on the labels of the train split, then meet the test split once; resumes as `pretrain` does."""
    from igpt_lab.training import parallel

    loaded = lab.load_model(model, revision=revision, random=random)
    train, test = (lab.load_images(images, split, limit=limit) for split in ("train", "test"))
    with parallel.together():
        lab.finetune(loaded, train, lab.Tuning(**tuning), out, device=device)
        if parallel.rank():
            return
    found = lab.classify(lab.load_classifier(out, device=device), test)
    reached, counts = found.accuracy(), found.confusion()
    record = lab.RunRecord("finetune", {"model": model, "images": images, **reached}, seed=tuning["seed"])
    confusion = lab.figures.confusion_matrix(counts, title=f"{loaded.name}, fine-tuned on {train.name}")
    files = lab.figures.save_figure(confusion, Path(out) / "confusion", data=counts, record=record)
    if len(wrong := found.mistakes()) and hasattr(test, "column"):
        table = found.table().iloc[wrong]
        shown = [f"{row.predicted}, not {row.label}" for row in table.itertuples()]
        gallery = lab.figures.gallery(loaded.processor.resize(test.images(wrong)), columns=4, scale=12, titles=shown)
        files += lab.figures.save_figure(gallery, Path(out) / "mistakes", data=table, record=record)
    low, high = (found.accuracy()[end] for end in ("low", "high"))
    print(f"{found.correct.mean():.1%} [{low:.1%}, {high:.1%}] of {len(test):,} test images right", *files, sep="\n")


def classify(folder: str, files: list[str], top: int, device: str | None) -> None:
    """Print the most probable labels of picture files, by a model that `finetune` wrote."""
    from PIL import Image

    model, pictures = lab.load_classifier(folder, device=device), []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(picture.convert("RGB"))
    found = lab.classify(model, pictures)
    for file, chances in zip(files, found.probabilities, strict=True):
        best = sorted(range(len(chances)), key=lambda k: -chances[k])[:top]
        print(f"{file}  " + "  ".join(f"{found.names[k]} {chances[k]:.1%}" for k in best))


def sample(
    model: str, count: int, columns: int, scale: int, out: str, device: str | None, revision: str | None, **how
) -> int:
    """Draw images from nothing: a gallery as png, pdf and svg, tokens with their seeds as csv, settings as json."""
    loaded = _on_device(model, device, revision)
    drawn = lab.sample(loaded, count, **how)
    gallery = lab.figures.gallery(loaded.processor.decode(drawn.tokens), columns=columns, scale=scale)
    return _save_drawn(gallery, out, drawn, loaded, how)


def complete(
    model: str, images: str, split: str, limit: int, keep: float, completions: int, out: str, device: str | None,
    revision: str | None, **how,
) -> int:  # fmt: skip
    """Keep the upper part of images and draw the rest several times; files as of `sample`."""
    loaded = _on_device(model, device, revision)
    originals, source = _primes(loaded, images, split, limit)
    drawn = lab.complete(loaded, originals, keep=keep, completions=completions, **how)
    decode, rows = loaded.processor.decode, lab.prime_rows(loaded, keep)
    pictures = [decode(originals), [decode(each) for each in drawn.tokens], decode(originals)]
    gallery = lab.figures.completion_gallery(*pictures, prime_rows=rows)
    return _save_drawn(gallery, out, drawn, loaded, how | source | {"keep": keep, "completions": completions})


def _on_device(model: str, device: str | None, revision: str | None):
    """A model with a palette, on the device that was named or on the accelerator where there is one."""
    from igpt_lab.core.devices import best_device

    loaded = lab.load_model(model, revision=revision)
    if loaded.processor is None:
        raise ValueError(f"{model} has no palette (preprocessor_config.json), without which tokens make no image")
    return loaded.to(device or best_device())


def _primes(model, images: str, split: str, limit: int):
    """Tokens (S, T) of a picture file or of an image set, and what they are."""
    from PIL import Image

    if Path(images).is_file() and Path(images).suffix.lower() in Image.registered_extensions():
        with Image.open(images) as picture:
            return model.processor.encode([picture]), {"images": Path(images).name}
    given = lab.load_images(images, split, limit=limit)
    tokens = lab.tokenize(given, model.processor, progress=False)
    return tokens, {"images": given.name, "split": split, "index": given.index.tolist()}


def _save_drawn(gallery, out: str, drawn, model, settings: dict) -> int:
    """Write the figure with tokens, seeds and settings; exit code 130 where drawing was interrupted."""
    config = settings | {"model": model.name, "finished_rows": drawn.rows.ravel().tolist()}
    record = lab.RunRecord(Path(out).name, config, seed=settings["seed"])
    print(*lab.figures.save_figure(gallery, out, data=drawn.table(), record=record), sep="\n")
    return 0 if (drawn.rows == lab.prime_rows(model, 1)).all() else 130


def convert_openai(folder: str, out: str, palette: str | None, step: int | None, bert: bool | None) -> None:
    """An original TensorFlow checkpoint into a model's folder; TensorFlow is not needed."""
    from igpt_lab.models import openai

    print(openai.describe(openai.find_openai(folder, step=step)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        path = openai.convert_openai(folder, out, palette=palette, step=step, bert=bert)
    for each in told:
        if each.category is UserWarning:  # a missing palette
            print(f"igpt-lab: {each.message}", file=sys.stderr)
    print(path)


def download_openai(size: str | None, step: int, bert: bool, datasets: list[str], cache: str | None) -> None:
    """Fetch what OpenAI published: a checkpoint with its palette, and images as tokens; prints what comes next."""
    from igpt_lab.models import openai

    folder = openai.download_openai(size, step, bert=bert, datasets=datasets, cache=cache)
    if size:
        print(f"igpt-lab convert-openai {shlex.quote(str(folder))} OUT")
    for name in datasets:
        tokens = Path(cache or openai.cache_folder()) / "datasets" / name
        print(f"igpt-lab extract {'OUT' if size else 'MODEL'} {shlex.quote(str(tokens))}")


def figures(folder: str, style: str, out: str | None) -> int:
    """Draw every figure of a results folder again, from its table, in a style: seconds, and no model is needed."""
    files = [file for file in sorted(Path(folder).glob("*.json")) if file.with_suffix(".csv").exists()]
    if not files:
        raise ValueError(f"{folder} has no figures (NAME.json beside NAME.csv); expected a folder of results")
    target, undrawn = Path(out or Path(folder) / style), []
    for file in files:
        try:
            print(lab.figures.redraw(file, target / file.stem, style=style)[1])
        except ValueError as error:
            undrawn.append(f"igpt-lab: {error}")
    print(*undrawn, sep="\n", end="\n" if undrawn else "", file=sys.stderr)
    return int(bool(undrawn))


def report(run: str, out: str | None, pdf: bool) -> None:
    """One HTML page of a results folder: figures, tables, provenance, doubts; and a pdf where there is a Chromium."""
    from igpt_lab.app.report import write_report

    written = write_report(run, out, pdf=pdf)
    print(*written, sep="\n")
    if pdf and len(written) == 1:
        print(
            "igpt-lab: no Chromium is installed, so there is no pdf; print the page from any browser", file=sys.stderr
        )


def plan(model: str, images: str, devices: str) -> None:
    """What an extraction of all layers costs on accelerators: FLOPs, bytes, time and memory, by arithmetic."""
    from igpt_lab.features import planning
    from igpt_lab.models import checkpoints

    config = lab.SIZES[model] if model in lab.SIZES else None
    if config is None:
        config = lab.ImageGPTConfig.from_pretrained(checkpoints.resolve(model, weights=False))
    count = planning.IMAGES.get(images) or (int(images) if images.isdigit() else None)
    count = count or sum(len(lab.load_images(images, split)) for split in ("train", "test"))
    print(planning.describe(planning.plan(config, count, devices=devices)))


def stores(root: str) -> None:
    """List the feature stores in a folder: size, rows, layers, key and completeness."""
    from igpt_lab.features import upkeep

    table = upkeep.list_stores(root)
    print(table.to_string(index=False, float_format="{:,.1f}".format) if len(table) else f"no stores in {root}")


def verify(store: str, repair: bool) -> int:
    """Recompute a store's digests, rows and columns, and list every problem; exit code 1 if there is one."""
    from igpt_lab.features import upkeep

    problems = upkeep.verify(store)
    for line in dict.fromkeys(problem for _, _, problem in problems):
        print(line)
    if problems and repair:
        upkeep.repair(store, problems)
        problems = upkeep.verify(store)
        print(f"{store}: " + ("still not whole" if problems else "repaired"))
    elif not problems:
        print(f"{store}: whole, every digest as listed")
    return int(bool(problems))


def prune(root: str, yes: bool) -> None:
    """Show incomplete stores, leftover temporary files and parts that no manifest lists; --yes deletes them."""
    from igpt_lab.features import upkeep

    found = upkeep.leftovers(root)
    size = sum(each.size for each in found)
    for each in found:
        print(f"{each.size / 1e6:10,.3f} MB  {each.what}  {each.path}")
        if yes:
            upkeep.remove(each)
    hint = "deleted" if yes else "--yes deletes them"
    print(f"{size / 1e6:10,.3f} MB  in {len(found)} of these; {hint}" if found else f"nothing to prune in {root}")


def reproduce(model: str, images: str, out: str, quick: bool, only: list[str] | None) -> int:
    """Execute the notebooks in order, keep them under OUT, and print what they found."""
    names = [name for name in notebooks.NOTEBOOKS if not only or name in only]
    begun, out = time.perf_counter(), Path(out).resolve()
    model_path, images_path = (str(Path(it).resolve()) if Path(it).exists() else it for it in (model, images))
    values = {"model": model_path, "images": images_path, "out": str(out)}
    lab.load_model(model), lab.load_images(images, "test", limit=1)  # a wrong name is told before any work
    values |= notebooks.QUICK if quick else {}
    for number, name in enumerate(names, 1):
        failed = notebooks.run_notebook(name, values, out, f"{number}/{len(names)} {name}")
        if failed:
            print(f"igpt-lab: {failed}", file=sys.stderr)
            return 1
    if notebooks.CURVE not in names:
        print(f"figures and tables: {out}")
        return 0
    summary = notebooks.summary(out) | {
        "model": model,
        "images": images,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    atomic_write(out / "summary.json", json.dumps(summary, indent=2, sort_keys=True) + "\n")
    low, high = summary["best_interval"]
    print(
        f"{model} on {images}, {summary['test_rows']:,} test images, {summary['seconds']:.0f} s\n"
        f"best layer   {summary['best_layer']} of 0..{summary['n_layers']}: {summary['best_accuracy']:.1%} "
        f"[{low:.1%}, {high:.1%}]\n"
        f"first, last  {summary['first_accuracy']:.1%}, {summary['last_accuracy']:.1%}\n"
        f"best against last, same test images: p = {summary['p_value']:.2g} (McNemar's exact test)\n"
        f"figures and tables: {out}"
    )
    return 0


def open_lab(folder: str, port: int, browser: bool) -> None:
    """Open JupyterLab on FOLDER, with a copy of the notebooks in it; your edits are never overwritten."""
    copied, there = notebooks.copy_notebooks(notebooks.notebooks(), Path(folder) / "notebooks")
    print(f"{Path(folder) / 'notebooks'}: {len(copied)} notebooks copied, {len(there)} left as they are", flush=True)
    notebooks.open_lab(Path(folder), first=f"notebooks/{notebooks.NOTEBOOKS[0]}.ipynb", port=port, browser=browser)


def _share(text: str) -> tuple[int, int]:
    """3/8 as (3, 8)."""
    number, of = text.split("/")
    return int(number), int(of)


def _parser(chosen: str) -> argparse.ArgumentParser:
    """All commands; a recipe's fields, which take torch to read, are options only where their command is chosen."""
    parser = argparse.ArgumentParser(prog="igpt-lab", description=lab.__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model, images = "bundled name, folder or Hub name of a model", "bundled name, folder, Parquet or Hub name of images"

    def command(function, /, *, called: str = "", **positional) -> argparse.ArgumentParser:
        text = function.__doc__
        added = commands.add_parser(called or function.__name__.replace("_", "-"), help=text, description=text)
        added.set_defaults(command=function)
        for name, description in positional.items():
            added.add_argument(name, help=description)
        return added

    add = command(extract, model=model, images=images).add_argument
    add("--split", action="append", help="repeatable; train and test when not given")
    add("--limit", type=int, help="at most so many images of each split, a seeded stratified draw")
    add("--store", default="stores", help="folder of the stores (stores)")
    add("--random", action="store_true", help="draw the weights anew: the untrained control")
    add("--point", action="append", help="place in a block, repeatable (ln_1)")
    add("--layers", type=int, nargs="+", help="these only; blocks above the deepest do not run (all)")
    add("--pool", default="mean", help="mean, last, max or grid:g (mean)")
    add("--alignment", choices=["sos", "raw"], help="start token in front, or not (sos; raw for a BERT model)")
    add("--dtype", choices=["float32", "bfloat16"], help="of the matrix products (bfloat16 on CUDA, else float32)")
    add("--batch-size", type=int, help="images at a time (by the device)")
    add("--on-bad-image", choices=["error", "skip"], default="error", help="(error)")
    add("--engine", choices=["local", "dask"], default="local", help="dask: on the workers of a cluster (local)")
    add("--scheduler", metavar="ADDRESS", help="of a Dask cluster, tcp://...; without it workers are started here")
    add("--workers", type=int, help="processes with --engine dask (one a device), else threads that decode")
    add("--deadline", type=float, help="seconds that a worker may take for a part (20 times what is usual)")
    add("--part", type=_share, metavar="I/N", help="every N-th part from the I-th on, for job arrays (all)")
    add("--device", help="cpu, cuda, mps, ...; the accelerator where there is one")
    add("--revision", help="branch, tag or commit of a model on the Hub")

    add = command(check, model=model).add_argument
    add("--images", help=f"{images}; random tokens when not given")
    add("--split", default="test")
    add("--device", help="cpu, cuda, mps, ...; the accelerator where there is one")

    add = command(ablate, model=model, images=images).add_argument
    add("--limit", type=int, help="at most so many images of each split, a seeded stratified draw")
    add("--layers", type=int, nargs="+", help="these only (all)")
    add("--store", default="stores", help="folder of the stores (stores)")
    add("--out", default="results", help="folder for the figure and its table (results)")
    add("--device", help="cpu, cuda, mps, ...; the accelerator where there is one")
    add("--revision", help="branch, tag or commit of a model on the Hub")

    add = command(dynamics).add_argument
    add("models", nargs="+", metavar="MODEL", help="folders of pretrain, bundled names, or folders of step-* folders")
    add("--images", required=True, help=images)
    add("--limit", type=int, help="at most so many images of each split, a seeded stratified draw")
    add("--layers", type=int, nargs="+", help="these only (all)")
    add("--final", action="store_true", help="only the end of each: models side by side, with raw pixels")
    add("--store", default="stores", help="folder of the stores (stores)")
    add("--out", default="results", help="folder for the figure and its table (results)")
    add("--name", help="of the figure (training_dynamics, or model_comparison with --final)")

    add = command(evaluate, model=model, images=images).add_argument
    add("--split", default="test")
    add("--limit", type=int, help="at most so many images")
    add("--revision", help="branch, tag or commit of a model on the Hub")

    add = command(pretrain, images=images).add_argument
    add("--out", required=True, help="folder for the model, its log and its checkpoints")
    add("--init", metavar="MODEL", help="begin with this model's weights, shape and palette, not with random ones")
    for name, default in SHAPE.items():
        add(f"--{name}", type=int, help=f"({default})")
    add("--bert", action="store_true", help="predict hidden pixels from all others, as the paper's BERT models do")
    add("--limit", type=int, help="at most so many images")
    if chosen == "pretrain":
        _add_fields(add, lab.Recipe)

    add = command(finetune, model=model, images=images).add_argument
    add("--out", required=True, help="folder for the classifier, its log, and what it gets wrong")
    add("--limit", type=int, help="at most so many images of each split, a seeded stratified draw")
    add("--random", action="store_true", help="from scratch: draw the weights anew")
    add("--device", help="cpu, cuda, mps, ...; the accelerator where there is one")
    add("--revision", help="branch, tag or commit of a model on the Hub")
    if chosen == "finetune":
        _add_fields(add, lab.Tuning)

    add = command(classify, folder="what finetune wrote").add_argument
    add("files", nargs="+", metavar="FILE", help="picture files")
    add("--top", type=int, default=3, help="labels to print of each (3)")
    add("--device", help="cpu, cuda, mps, ...; the accelerator where there is one")

    def add_drawing(add, out: str) -> None:
        add("--temperature", type=float, default=1.0, help="0 takes the most probable colour (1.0)")
        add("--top-k", type=int, help="only so many colours (all)")
        add("--top-p", type=float, help="only the fewest colours that reach this probability together (all)")
        add("--seed", type=int, default=0, help="(0)")
        add("--batch-size", type=int, help="images at a time (by memory); changes no image")
        add("--out", default=out, help=f"files to write, without their endings ({out})")
        add("--device", help="cpu, cuda, mps, ...; the accelerator where there is one")
        add("--revision", help="branch, tag or commit of a model on the Hub")

    add = command(sample, model=model).add_argument
    add("--count", type=int, default=64, help="(64)")
    add("--columns", type=int, default=16, help="of the gallery (16)")
    add("--scale", type=int, default=4, help="pixels of the png for one of an image (4)")
    add_drawing(add, "samples")

    add = command(complete, model=model, images=f"{images}; or a picture file").add_argument
    add("--split", default="test", help="(test)")
    add("--limit", type=int, default=16, help="images, a seeded stratified draw (16)")
    add("--keep", type=float, default=0.5, help="the upper fraction that is given (0.5)")
    add("--completions", type=int, default=4, help="of each (4)")
    add_drawing(add, "completions")

    add = command(convert_openai, folder="folder with model.ckpt-STEP.index and its data files, or that prefix",
                  out="folder for the model").add_argument  # fmt: skip
    add("--palette", metavar="FILE", help="its kmeans_centers.npy, when that is not in the folder")
    add("--step", type=int, help="which of several checkpoints in the folder")
    add("--bert", action="store_true", default=None, help="fail unless it is a BERT model")

    add = command(download_openai).add_argument
    add("--size", choices=["s", "m", "l"])
    add("--step", type=int, default=1_000_000, choices=[131_000, 262_000, 524_000, 1_000_000], help="(1000000)")
    add("--bert", action="store_true", help="the BERT model in place of the autoregressive one")
    add("--datasets", nargs="+", default=[], choices=["cifar10", "imagenet"], help="32 x 32 images as tokens")
    add("--cache", metavar="FOLDER", help="where files are kept (igpt-lab/openai under ~/.cache or XDG_CACHE_HOME)")

    add = command(figures, folder="folder of results").add_argument
    add("--style", default="paper", choices=["paper", "wide", "talk"], help="one column, two columns, slides (paper)")
    add("--out", help="where they go; the folder itself redraws in place (FOLDER/STYLE)")

    add = command(report, run="folder of results").add_argument
    add("--out", metavar="FILE", help="where the page goes (RUN/report.html)")
    add("--no-pdf", dest="pdf", action="store_false", help="the page only")

    add = command(
        plan, model=f"S, M, L, XL, or {model}", images=f"a number, cifar10, imagenet, or {images}"
    ).add_argument
    add("--devices", default="1xH100", help="such as 8xH100 (1xH100)")

    command(stores).add_argument("root", nargs="?", default="stores", help="folder of the stores (stores)")
    add = command(verify, store="folder of one store").add_argument
    add("--repair", action="store_true", help="compute the bad parts again, from the model and images they came from")
    add = command(prune).add_argument
    add("root", nargs="?", default="stores", help="folder of the stores (stores)")
    add("--yes", action="store_true", help="delete what is shown")

    add = command(reproduce).add_argument
    add("--model", default="fashion-xs", help=model)
    add("--images", default="fashion-mini", help=images)
    add("--out", default="results", help="folder for figures, tables and executed notebooks (results)")
    add("--quick", action="store_true", help="few images, in a few minutes: to see that it runs")
    add("--only", action="append", choices=notebooks.NOTEBOOKS, metavar="NOTEBOOK", help="not all; may be given again")

    add = command(open_lab, called="lab").add_argument
    add("folder", nargs="?", default="workbench", help="notebooks/ and results/ go into it (workbench)")
    add("--port", type=int, default=8888, help="the next free one where it is taken (8888)")
    add("--no-browser", action="store_false", dest="browser", help="print the address, open nothing")
    return parser


def _add_fields(add, settings: type) -> None:
    """An option for each field of a dataclass of settings."""
    for field in fields(settings):
        if field.name in ("betas", "class_weights"):
            continue
        given = {"required": True} if field.default is MISSING else {"default": field.default}
        name, kind = f"--{field.name.replace('_', '-')}", field.type.removesuffix(" | None")
        if kind == "bool":
            add(name, action=argparse.BooleanOptionalAction, **given)
        else:
            kind = {"int": int, "float": float, "str": str}[kind]
            add(name, type=kind, help=f"({given.get('default', 'required')})", **given)
    if any(field.name == "class_weights" for field in fields(settings)):
        add("--class-weights", choices=["balanced"], help="weigh classes inversely to their images")


if __name__ == "__main__":
    sys.exit(main())
