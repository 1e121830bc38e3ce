"""igpt-lab: what does a network that learned only to predict the next pixel know about its image, and at which depth?

import igpt_lab as lab offers the main names; each is imported when it is first used.
"""

import difflib
import importlib
import sys

__version__ = "0.1.0"

_HOME = {
    "Drawn": "sampling",
    "FeatureStore": "store",
    "Features": "probes",
    "ImageGPTConfig": "model",
    "ImageGPTForCausalImageModeling": "model",
    "ImageGPTForImageClassification": "model",
    "ImageGPTImageProcessor": "pixels",
    "ImageGPTImageProcessorPil": "pixels",
    "ImageGPTModel": "model",
    "LinearProbe": "probes",
    "Recipe": "training",
    "RunRecord": "provenance",
    "SIZES": "model",
    "StoredLayers": "store",
    "Tuning": "finetuning",
    "ablate_protocol": "ablation",
    "check": "checks",
    "checkpoints_of": "dynamics",
    "cka": "geometry",
    "classify": "finetuning",
    "compare": "significance",
    "compare_layers": "probes",
    "compare_samples": "likeness",
    "complete": "sampling",
    "control_task": "probes",
    "convert_openai": "openai",
    "download_openai": "openai",
    "effective_rank": "geometry",
    "explore": "explorer",
    "extract": "extraction",
    "features_of": "likeness",
    "few_per_class": "data",
    "finetune": "finetuning",
    "fit_logistic": "logistic",
    "fit_palette": "palette",
    "intrinsic_dimension": "geometry",
    "label_overlap": "geometry",
    "layer_table": "significance",
    "load_classifier": "finetuning",
    "load_images": "data",
    "load_model": "extraction",
    "load_tokens": "data",
    "masked_pixel_loss": "model",
    "measure_layers": "geometry",
    "nearest": "likeness",
    "next_pixel_loss": "model",
    "peak_set": "significance",
    "pretrain": "training",
    "prime_rows": "sampling",
    "probe_checkpoints": "dynamics",
    "probe_models": "dynamics",
    "probe_few_labels": "probes",
    "probe_layers": "probes",
    "probe_neighbours": "probes",
    "probe_on_cluster": "streaming",
    "probe_streaming": "streaming",
    "record": "hooks",
    "results_folder": "runs",
    "sample": "sampling",
    "spread": "significance",
    "surprise": "likeness",
    "tokenize": "data",
}
_MODULES = {"figures", *_HOME.values()}
__all__ = [*_HOME, "figures"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"igpt_lab.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"igpt_lab.{name}")
    close = difflib.get_close_matches(name, __all__, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(__all__)}"
    raise AttributeError(f"igpt_lab has no {name!r}; {hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "IPython" in sys.modules:  # in a notebook a failing cell says first what to do
    importlib.import_module("igpt_lab.cells").explain_errors()
