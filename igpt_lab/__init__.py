"""igpt-lab: what does a network that learned only to predict the next pixel know about its image, and at which depth?

import igpt_lab as lab offers the main names; each is imported when it is first used, and nothing global is changed.
In a notebook, %load_ext igpt_lab puts a line of advice before the traceback of an error that comes out of this package.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__version__ = "0.1.0"

_HOME = {
    "Drawn": "sampling.sampling",
    "FeatureStore": "features.store",
    "Features": "probing.probes",
    "ImageGPTConfig": "models.config",
    "ImageGPTForCausalImageModeling": "models.imagegpt",
    "ImageGPTForImageClassification": "models.imagegpt",
    "ImageGPTImageProcessor": "images.processor",
    "ImageGPTImageProcessorPil": "images.processor",
    "ImageGPTModel": "models.imagegpt",
    "LinearProbe": "probing.solvers.linear_probe",
    "Recipe": "training.pretraining",
    "RunRecord": "core.provenance",
    "SIZES": "models.config",
    "StoredLayers": "features.store",
    "Tuning": "training.finetuning",
    "ablate_protocol": "probing.ablation",
    "check": "features.checks",
    "checkpoints_of": "training.dynamics",
    "cka": "probing.geometry",
    "classify": "training.classifier",
    "compare": "core.significance",
    "compare_layers": "probing.probes",
    "compare_samples": "sampling.likeness",
    "complete": "sampling.sampling",
    "control_task": "probing.probes",
    "convert_openai": "models.openai",
    "download_openai": "models.openai",
    "effective_rank": "probing.geometry",
    "explore": "app.explorer.widget",
    "extract": "features.extraction",
    "features_of": "sampling.likeness",
    "few_per_class": "images.splits",
    "finetune": "training.finetuning",
    "fit_logistic": "probing.solvers.logistic",
    "fit_palette": "images.palette",
    "intrinsic_dimension": "probing.geometry",
    "label_overlap": "probing.geometry",
    "layer_table": "core.significance",
    "load_classifier": "models.loading",
    "load_images": "images.image_sets",
    "load_model": "models.loading",
    "load_tokens": "images.image_sets",
    "masked_pixel_loss": "models.losses",
    "measure_layers": "probing.geometry",
    "nearest": "sampling.likeness",
    "next_pixel_loss": "models.losses",
    "peak_set": "core.significance",
    "pretrain": "training.pretraining",
    "prime_rows": "sampling.sampling",
    "probe_checkpoints": "training.dynamics",
    "probe_models": "training.dynamics",
    "probe_few_labels": "probing.few_labels",
    "probe_layers": "probing.probes",
    "probe_neighbours": "probing.neighbours",
    "probe_on_cluster": "probing.streaming",
    "probe_streaming": "probing.streaming",
    "record": "features.hooks",
    "results_folder": "app.runs",
    "sample": "sampling.sampling",
    "spread": "core.significance",
    "surprise": "models.losses",
    "tokenize": "images.tokens",
}
__all__ = [*_HOME, "figures"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"igpt_lab.{_HOME[name]}"), name)
    if name == "figures":
        return importlib.import_module(f"igpt_lab.{name}")
    close = difflib.get_close_matches(name, __all__, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(__all__)}"
    raise AttributeError(f"igpt_lab has no {name!r}; {hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(ipython: InteractiveShell) -> None:
    """%load_ext igpt_lab: from now on a failing cell says first what to do."""
    importlib.import_module("igpt_lab.core.display").explain_errors(ipython)


def unload_ipython_extension(ipython: InteractiveShell) -> None:
    """%unload_ext igpt_lab: errors are shown as ever."""
    importlib.import_module("igpt_lab.core.display").leave_errors(ipython)
