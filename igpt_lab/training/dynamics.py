"""How features form: every checkpoint of a run, its loss and a linear probe at each layer (the paper's Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device
from igpt_lab.core.hub import CheckpointError, read_json, resolve
from igpt_lab.core.progress import tqdm
from igpt_lab.core.provenance import digest
from igpt_lab.features.extraction import extract
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model, tokens_of
from igpt_lab.models.losses import losses_of
from igpt_lab.probing.features import Features
from igpt_lab.probing.probes import CS, probe_layers
from igpt_lab.probing.results import ProbeResult, compare_layers


@checked
def checkpoints_of(source: str | Path) -> dict[int, Path]:
    """The checkpoints of a model: step -> folder, in order. The last one is the model itself, where it is there.

    `source` is a bundled or Hub name, a folder of `pretrain`, finished or not, or a folder of `step-*` folders, such as
    the original's, converted, step-131000 to step-1000000. A model alone, without a log of its steps, counts as one.
    Folders that are not whole are left out, and so is the model of a run that was made longer and has not ended.
    """
    folder = resolve(source)
    folders = [*folder.glob("step-*"), *folder.glob("checkpoints/step-*")]
    folders = [path for path in folders if path.name[5:].isdecimal() and (path / "config.json").is_file()]
    steps = {int(path.name.removeprefix("step-")): path for path in folders}
    if (folder / "config.json").exists():
        last = _last_step(folder / "log.csv", folder / "training.json")
        if last is None:
            last = max(steps, default=0) + 1
        if last:
            steps[last] = folder
    if not steps:
        raise ValueError(
            f"{folder} has neither a model nor checkpoints; expected folders step-NUMBER, as pretrain leaves"
        )
    return dict(sorted(steps.items()))


@checked
def probe_checkpoints(
    checkpoints: Mapping[int, str | Path],
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    *,
    store: str | Path = "stores",
    name: str = "",
    untrained: bool = True,
    layers: Sequence[int] | None = None,
    Cs: Sequence[float] = CS,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Probe every layer of every checkpoint of a pretraining; features go to `store`, one store a checkpoint.

    Args:
        checkpoints: Step -> folder, as `checkpoints_of` gives them.
        train_images, test_images: Two splits with labels.
        store: Folder of the stores.
        name: What the column `model` says.
        untrained: Begin with the network before its first step, at step 0.
        layers: All by default.
        Cs: Inverse strengths of the penalty to choose from.
        seed: Of the folds, and of the untrained network.
        device: Where model and fits run, by default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        A row per checkpoint and layer: that of `probe_layers`, with `model`, `step`, and `loss` over the test images,
        in nats per token, with `loss_error`, its standard error over images (NaN of a BERT model). `drop`, `drop_low`,
        `drop_high`, `drop_choice_low`, `drop_choice_high` and `drop_p` compare the chosen layer with the last
        (`compare_layers`), the same in all rows of a checkpoint.

    Raises:
        ValueError: A layer that a model has not, images without labels or that do not fit a model.
        CheckpointError: A folder that is no whole checkpoint.

    Example:
        >>> table = lab.probe_checkpoints({1: "tiny"}, train_images, test_images, layers=[3], Cs=[0.1], name="tiny")
        >>> table[["model", "step", "layer", "n_test", "loss"]].round(3)
          model  step  layer  n_test   loss
        0  tiny     0      3     100  2.079
        1  tiny     1      3     100  2.079
    """
    sources = dict(checkpoints)
    begins_untrained = untrained and 0 not in checkpoints
    if begins_untrained:
        sources = {0: next(iter(checkpoints.values())), **checkpoints}
    rows = []
    for step, source in tqdm(sources.items(), desc="checkpoints", disable=not progress):
        model = load_model(source, random=begins_untrained and step == 0, seed=seed).to(best_device(device))
        features = extract(
            model, [train_images, test_images], store=store, layers=layers, device=device, progress=False
        )
        train, test = (Features.from_store(features, images.split) for images in (train_images, test_images))
        result = probe_layers(train, test, Cs=Cs, seed=seed, device=device, progress=False)
        rows.append(result.table.assign(**_loss(model, test_images), **_drop(result)))
        rows[-1].insert(0, "step", step)
    table = pd.concat(rows, ignore_index=True)
    table.insert(0, "model", name)
    return table


@checked
def probe_models(
    models: Mapping[str, str | Path], train_images: ImageSet, test_images: ImageSet, *, seed: int = 0, **options
) -> pd.DataFrame:
    """Several models side by side: `probe_checkpoints` of each one's last checkpoint alone.

    Args:
        models: Name -> source.
        train_images, test_images: Two splits with labels.
        seed: Of the folds.
        **options: Further arguments of `probe_checkpoints`.

    Returns:
        The rows of `probe_checkpoints` for each model, and one of control "raw pixels", the probe of the pixels as that
        model is shown them.

    Raises:
        ValueError: A model without a palette, and as `probe_checkpoints`.
        TypeError: An option that `probe_checkpoints` does not have.
        CheckpointError: No such source, or one that is not whole.

    Example:
        >>> table = lab.probe_models({"a": "tiny"}, train_images, test_images, layers=[3], Cs=[0.1])
        >>> table[["model", "control", "layer", "n_features"]]
          model     control  layer  n_features
        0     a       model      3           8
        1     a  raw pixels      0          16
    """
    tables: list[pd.DataFrame] = []
    pixels: dict[str, pd.DataFrame] = {}
    for name, source in tqdm(models.items(), desc="models"):
        step, folder = checkpoints_of(source).popitem()
        tables.append(
            probe_checkpoints(
                {step: folder},
                train_images,
                test_images,
                name=name,
                untrained=False,
                seed=seed,
                progress=False,
                **options,
            )
        )
        processor = load_model(folder).processor
        if processor is None:
            raise ValueError(f"{folder} has no palette (preprocessor_config.json), so it is shown no pixels to probe")
        train, test = (Features.from_pixels(images, processor) for images in (train_images, test_images))
        shown = digest(train.layers[0].tobytes() + test.layers[0].tobytes())  # runs of other seeds are shown the same
        if shown not in pixels:
            pixels[shown] = probe_layers(train, test, seed=seed, control="raw pixels", progress=False).table
        tables.append(pixels[shown].assign(model=name, step=step))
    return pd.concat(tables, ignore_index=True)


def _last_step(log: Path, record: Path) -> int | None:
    """The step of a folder's model by its log: None without a log, 0 where the run goes on and the model is older."""
    if not log.exists():
        return None
    try:
        last = int(pd.read_csv(log).step.iloc[-1])
        ends = int(read_json(record)["recipe"]["steps"]) if record.exists() else last
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{log} or {record.name} does not say of which step the model is ({error})") from error
    return last if last >= ends else 0


def _loss(model: ImageGPTForCausalImageModeling, images: ImageSet | TokenSet) -> dict[str, float]:
    """Mean over images of their loss in nats per token, and its standard error."""
    if model.config.bidirectional:
        return {"loss": np.nan, "loss_error": np.nan}
    nats = losses_of(model, tokens_of(model, images))
    return {"loss": nats.mean(), "loss_error": nats.std(ddof=1) / np.sqrt(len(nats))}


def _drop(result: ProbeResult) -> dict[str, float]:
    """What is lost between the chosen layer and the last, of a result with several layers."""
    if len(result.correct) < 2:
        return {}
    drop = compare_layers(result)
    ends = {"drop_low": drop.low, "drop_high": drop.high}
    ends |= {"drop_choice_low": drop.choice_low, "drop_choice_high": drop.choice_high}
    return {"drop": drop.difference, **ends, "drop_p": drop.p_value}
