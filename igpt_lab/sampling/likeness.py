"""Do drawn images look like real ones? Numbers with intervals, and the nearest real image.

Every number stands beside the same number of other real images: the distance between two samples of one distribution is
not zero either.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import accuracy
from igpt_lab.features.hooks import record
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling

LEVELS = 4  # of brightness in a 2 x 2 patch: 256 patterns
FOLDS = 5


@checked
def features_of(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, *, layer: int | None = None, batch_size: int = 32,
    progress: bool = True,
) -> np.ndarray:  # fmt: skip
    """`ln_1` of one layer, mean over positions, start token in front.

    Args:
        model: One that predicts pixels in their order.
        tokens: Palette indices (N, T).
        layer: 0..L, by default the middle one.
        batch_size: Images at a time.
        progress: Show a bar.

    Returns:
        float32 (N, D).

    Raises:
        ValueError: What cannot be tokens of this model, such as images, or a layer that there is not.

    Example:
        >>> lab.features_of(model, tokens).shape
        (100, 8)
    """
    layer = model.config.n_layer // 2 if layer is None else layer
    tokens, features = torch.as_tensor(checked_tokens(tokens, model.config).astype(np.int64)), []
    with torch.inference_mode(), record(model, layers=[layer], alignment="sos") as pooled:
        for batch in tqdm(tokens.split(batch_size), desc=f"layer {layer}", disable=not progress):
            pooled.run(batch.to(model.device), use_cache=False)
            features.append(pooled["ln_1"][:, 0].cpu().numpy().copy())
    return np.concatenate(features)


@checked
def nearest(queries: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of (S, ...) the nearest of (N, ...) in Euclidean distance: its row, int64 (S,), and how far, (S,).

    Images or features: all axes but the first are taken as one. A copy has distance 0.
    """
    from sklearn.metrics import pairwise_distances_argmin

    queries, candidates = (np.asarray(images, np.float64).reshape(len(images), -1) for images in (queries, candidates))
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"{queries.shape[1]} numbers in each query, {candidates.shape[1]} in each candidate")
    rows = pairwise_distances_argmin(queries, candidates)
    return rows, np.linalg.norm(queries - candidates[rows], axis=1)


@checked
def compare_samples(
    model: ImageGPTForCausalImageModeling, samples: np.ndarray, real: np.ndarray, *, layer: int | None = None,
    seed: int = 0, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """How far samples are from held-out images.

    Intervals are over images: of distances by the jackknife, of the accuracy Clopper and Pearson's.

    Args:
        model: Its palette and its features are used.
        samples: Palette indices (S, T), 10 or more.
        real: Palette indices (N, T) of images that the model was not trained on, N >= 2 S.
        layer: Whose features the classifier sees, by default the middle one.
        seed: Of the draw of S real images, and of the folds.
        progress: Show a bar.

    Returns:
        A row for each `measure`. `palette`: total variation distance between the distributions of colours, 0 to 1.
        `patches`: the same between those of 2 x 2 patches in 4 levels of brightness. `classifier`: the fraction that
        logistic regression on the features of a layer gets right, 5-fold, S of each; 0.5 where it cannot tell them
        apart. `value` with its 95% interval `low`, `high` is of samples against real images, `floor` with `floor_low`,
        `floor_high` of S other real images against the same. Then the counts `samples` and `images`.

    Raises:
        ValueError: Fewer samples or images than that, or what are no palette indices.

    Example:
        >>> drawn = lab.sample(model, 30)
        >>> lab.compare_samples(model, drawn.tokens, tokens)[["measure", "samples", "images"]]
              measure  samples  images
        0     palette       30      70
        1     patches       30      70
        2  classifier       30      70
    """
    samples, real = np.asarray(samples), np.random.default_rng(seed).permutation(np.asarray(real))
    count = len(samples)
    if len(real) < 2 * count or count < 2 * FOLDS:
        raise ValueError(f"{count} samples, {len(real)} images; expected {2 * FOLDS} samples or more, twice the images")
    others, reference = real[:count], real[count:]
    features = [
        features_of(model, images, layer=layer, progress=progress) for images in (samples, others, reference[:count])
    ]
    rows = []
    for name, counts in (("palette", palette_counts), ("patches", patch_counts)):
        drawn, second, first = (counts(images, model.processor.clusters) for images in (samples, others, reference))
        rows.append((name, *_distance(drawn, first), *_distance(second, first)))
    rows.append(("classifier", *(x for part in features[:2] for x in _told_apart(part, features[2], seed))))
    table = pd.DataFrame(rows, columns="measure value low high floor floor_low floor_high".split())
    return table.assign(samples=count, images=len(reference))


def palette_counts(tokens: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Pixels of each colour in each image, palette indices (N, T) -> int64 (N, V)."""
    return _counts(tokens, len(clusters))


def patch_counts(tokens: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """2 x 2 patches of each pattern in each image, palette indices (N, T) -> int64 (N, 256).

    Brightness is Rec. 601's of the palette's colours, in 4 equal steps from black to white; patches overlap.
    """
    brightness = (np.asarray(clusters) + 1) / 2 @ [0.299, 0.587, 0.114]
    steps = (brightness * LEVELS).astype(int).clip(0, LEVELS - 1)
    side = math.isqrt(tokens.shape[1])
    image = steps[tokens].reshape(len(tokens), side, side)
    corners = image[:, :-1, :-1], image[:, :-1, 1:], image[:, 1:, :-1], image[:, 1:, 1:]
    patterns = sum(corner * LEVELS**i for i, corner in enumerate(corners))
    return _counts(patterns.reshape(len(tokens), -1), LEVELS**4)


def _counts(values: np.ndarray, kinds: int) -> np.ndarray:
    """How often each of 0 to kinds - 1 is in each row."""
    rows = np.arange(len(values))[:, None] * kinds
    return np.bincount((rows + values).ravel(), minlength=len(values) * kinds).reshape(len(values), kinds)


def _distance(left: np.ndarray, right: np.ndarray) -> tuple[float, float, float]:
    """Total variation between the distributions of two sets of counts (images, kinds), and its 95% interval.

    The standard error is the jackknife's: each image left out in turn (Efron and Stein, 1981).
    """

    def variation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        one, other = (counts / counts.sum(-1, keepdims=True) for counts in (one, other))
        return np.abs(one - other).sum(-1) / 2

    totals, variance = (left.sum(0), right.sum(0)), 0.0
    for total, other, counts in ((*totals, left), (*totals[::-1], right)):
        without = variation(total - counts, other)
        variance += (len(counts) - 1) * without.var()
    value, half = float(variation(*totals)), 1.96 * math.sqrt(variance)
    return value, max(0.0, value - half), min(1.0, value + half)


def _told_apart(left: np.ndarray, right: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Accuracy of logistic regression at telling two sets of features apart, out of fold, with its 95% interval."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = np.concatenate([left, right]), np.repeat([0, 1], [len(left), len(right)])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    measured = accuracy(cross_val_predict(model, x, y, cv=folds) == y)
    return measured["test_accuracy"], measured["low"], measured["high"]
