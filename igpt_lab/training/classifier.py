"""What a fine-tuned model says of images: probabilities, accuracy, confusion and mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import accuracy
from igpt_lab.features.hooks import evaluating
from igpt_lab.images.loading import images_of
from igpt_lab.models.imagegpt import ImageGPTForImageClassification
from igpt_lab.models.loading import load_classifier, tokens_of
from igpt_lab.models.losses import align

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Classified:
    """`probabilities`: float32 (N, K) of the classes `names`; `labels`: int64 (N,), or None; `index`: int64 (N,).

    `files`: the file name of each image, '' where it has none; () where the images came without.
    """

    probabilities: np.ndarray
    names: tuple[str, ...]
    labels: np.ndarray | None
    index: np.ndarray
    files: tuple[str, ...] = ()

    @property
    def predicted(self) -> np.ndarray:
        """int64 (N,)."""
        return self.probabilities.argmax(1)

    @property
    def correct(self) -> np.ndarray:
        """bool (N,), as `significance.compare` takes it; ValueError without labels."""
        return self.predicted == self._labels()

    def _labels(self) -> np.ndarray:
        if self.labels is None:
            raise ValueError("these images have no labels, so nothing says which are right")
        return self.labels

    def accuracy(self) -> dict[str, float]:
        """Accuracy with its 95% interval over images (Clopper and Pearson)."""
        return accuracy(self.correct)

    def confusion(self) -> pd.DataFrame:
        """Confusion matrix: counts of images, a row per true class, a column per predicted class."""
        counts = confusion_matrix(self._labels(), self.predicted, labels=range(len(self.names)))
        return pd.DataFrame(counts, pd.Index(self.names, name="true"), pd.Index(self.names, name="predicted"))

    def plot(self, **options) -> Axes:
        """The confusion matrix: `options` are arguments of `lab.figures.confusion_matrix`, such as `ax`."""
        from igpt_lab import figures

        return figures.confusion_matrix(self.confusion(), **options)

    def mistakes(self, count: int = 12) -> np.ndarray:
        """Positions of misclassified images, int64, at most `count`, the most confident first."""
        wrong = np.flatnonzero(~self.correct)
        return wrong[np.argsort(-self.probabilities.max(1)[wrong], kind="stable")][:count]

    def table(self) -> pd.DataFrame:
        """A row for each image: `index`, `label` and `file` where there are any, `predicted` and its `probability`."""
        named = np.array(self.names, object)
        table = pd.DataFrame({"index": self.index, "predicted": named[self.predicted]})
        if self.labels is not None:
            table.insert(1, "label", named[self.labels])
        table = table.assign(probability=self.probabilities.max(1))
        return table.assign(file=self.files) if any(self.files) else table


@checked
def classify(
    model: ImageGPTForImageClassification | str | Path,
    images,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Classified:
    """The classes that a fine-tuned model predicts, start token in front; labels are kept beside them and not used.

    `images` are a set, what `load_images` takes, or Pillow images and arrays as a processor takes them; of an iterator
    no image is held. Raises ValueError for a model without a class head that was trained, and for what is no image.
    """
    model = load_classifier(model) if isinstance(model, str | Path) else model
    names = tuple((model.config.id2label or {}).values())
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(names))  # finetune names them
    if unnamed and not model.score.weight.any():  # one that finetune wrote may be zero, where its first step was best
        raise ValueError(
            f"{getattr(model, 'name', 'this model')} has no class head that was trained; expected what finetune wrote, "
            "as `igpt-lab finetune MODEL IMAGES --out DIR` does"
        )
    labels: np.ndarray | None = None
    files: tuple[str, ...] = ()
    if (image_set := images_of(images)) is not None:
        tokens = tokens_of(model, image_set, progress=progress)
        labels, index = image_set.labels, image_set.index
        files = image_set.files
        if labels is not None and image_set.label_names and tuple(image_set.label_names) != names:
            raise ValueError(f"the classes of {image_set.name} are {image_set.label_names}; the model's are {names}")
    else:
        if model.processor is None:
            raise ValueError(f"{model.name} has no palette (preprocessor_config.json): token sets are all it can take")
        if isinstance(images, np.ndarray) and images.ndim < 3:
            raise ValueError(f"an array {images.shape}; expected images (N, H, W, 3), or a list of them")
        tokens = model.processor.encode(images)
        index = np.arange(len(tokens))
    with evaluating(model):
        logits = logits_of(model, tokens, batch_size, progress)
    return Classified(logits.softmax(1).numpy(), names, labels, index, files)


@torch.inference_mode()
def logits_of(model: ImageGPTForImageClassification, tokens: np.ndarray, batch_size: int, progress: bool) -> Tensor:
    """float32 (N, K) on the CPU, of pixels (N, T)."""
    logits = []
    for start in tqdm(range(0, len(tokens), batch_size), desc="classify", unit="batch", disable=not progress, delay=2):
        pixels = torch.as_tensor(tokens[start : start + batch_size].astype(np.int64), device=model.device)
        logits.append(model(align(pixels, "sos", model.config), use_cache=False).logits.float())
    return torch.cat(logits).cpu()
