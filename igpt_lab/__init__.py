"""igpt-lab: what does a network that learned only to predict the next pixel know about its image, and at which depth?

import igpt_lab as lab offers the main names; each is imported when it is first used.
"""

import importlib
import warnings
from typing import Any

__version__ = "0.2.0"

_HOME = {
    "Ablation": "probing.ablation",
    "AttentionSummary": "explaining.attention",
    "Choice": "core.choice",
    "Classified": "training.classifier",
    "Comparison": "probing.results",
    "CorruptedImages": "images.corruptions",
    "Drawn": "sampling.sampling",
    "DropComparison": "probing.controls",
    "Edits": "explaining.edits",
    "Explanation": "explaining.explain",
    "Explorer": "app.explorer.widget",
    "ExtractionSettings": "features.settings",
    "FeatureStore": "features.store",
    "Features": "probing.features",
    "FewLabelResult": "probing.few_labels",
    "FineTuningComparison": "training.comparison",
    "FinetuneConfig": "training.settings",
    "Fits": "probing.solvers.logistic",
    "ImageGPTConfig": "models.config",
    "ImageGPTForCausalImageModeling": "models.imagegpt",
    "ImageGPTForImageClassification": "models.imagegpt",
    "ImageGPTImageProcessor": "images.processor",
    "ImageGPTImageProcessorFast": "images.processor",
    "ImageGPTImageProcessorPil": "images.processor",
    "ImageGPTModel": "models.imagegpt",
    "ImageGPTPreTrainedModel": "models.pretrained",
    "ImageSet": "images.image_sets",
    "LinearProbe": "probing.solvers.linear_probe",
    "Measurement": "explaining.measurement",
    "OverSeeds": "core.seeds",
    "PREDICTIONS": "explaining.predictions",
    "PairedDifference": "core.significance",
    "PeakSet": "core.peaks",
    "Pooled": "features.hooks",
    "PretrainConfig": "training.settings",
    "ProbeResult": "probing.results",
    "Readout": "explaining.linear_readout",
    "RunRecord": "core.provenance",
    "SIZES": "models.config",
    "Spread": "core.draws",
    "Summary": "core.display",
    "StoreWriter": "features.writing",
    "StoredLayers": "features.store",
    "TargetResult": "probing.targets",
    "TokenSet": "images.image_sets",
    "TunedLens": "explaining.tuned_lens",
    "ViewedImages": "images.views",
    "ablate_protocol": "probing.ablation",
    "align": "models.losses",
    "answer": "explaining.predictions",
    "attention_from": "explaining.attention",
    "attention_maps": "explaining.attention",
    "attribute": "explaining.attribution",
    "attribute_logits": "explaining.attribution",
    "bits_by_layer": "explaining.readouts",
    "check": "explaining.checks",
    "checkpoints_of": "training.dynamics",
    "choice_of": "core.choice",
    "cka": "probing.cka",
    "claims": "core.significance",
    "classify": "training.classifier",
    "compare": "core.significance",
    "compare_drops": "probing.controls",
    "compare_dtypes": "probing.dtypes",
    "compare_families": "core.seeds",
    "compare_fine_tuning": "training.comparison",
    "compare_layers": "probing.results",
    "compare_poolings": "probing.poolings",
    "compare_samples": "sampling.likeness",
    "complete": "sampling.sampling",
    "control_task": "probing.probes",
    "convert_openai": "models.openai",
    "corrupt": "images.corruptions",
    "derangement": "explaining.parts",
    "dime": "probing.entropies",
    "download_openai": "models.openai",
    "edit": "explaining.edits",
    "effective_rank": "probing.geometry",
    "explain": "explaining.explain",
    "explore": "app.explorer.opening",
    "extract": "features.extraction",
    "extract_on_cluster": "features.on_cluster",
    "extract_share": "features.extraction",
    "features_of": "sampling.likeness",
    "few_per_class": "images.splits",
    "finetune": "training.finetuning",
    "fit_logistic": "probing.solvers.logistic",
    "fit_palette": "images.palette",
    "fit_tuned_lens": "explaining.tuned_lens",
    "group_by_seed": "core.seeds",
    "holm": "core.significance",
    "image_properties": "images.properties",
    "info_nce": "probing.entropies",
    "information_imbalance": "probing.imbalance",
    "intrinsic_dimension": "probing.geometry",
    "label_overlap": "probing.geometry",
    "layer_table": "core.peaks",
    "leave_out": "explaining.ablations",
    "lens_strip": "explaining.lenses",
    "linear_readout": "explaining.linear_readout",
    "lidar": "probing.entropies",
    "load_classifier": "models.loading",
    "load_images": "images.loading",
    "load_model": "models.loading",
    "load_tokens": "images.loading",
    "logit_lens": "explaining.lenses",
    "masked_pixel_loss": "models.losses",
    "matrix_entropy": "probing.entropies",
    "mean_of": "explaining.parts",
    "measure_layers": "probing.geometry",
    "measure_states": "explaining.trajectories",
    "nearest": "sampling.likeness",
    "next_pixel_loss": "models.losses",
    "over_seeds": "core.seeds",
    "peak_set": "core.peaks",
    "permutation_p": "core.significance",
    "pixel_baselines": "explaining.baselines",
    "pretrain": "training.pretraining",
    "prime_rows": "sampling.sampling",
    "probe_attentive": "explaining.attentive",
    "probe_checkpoints": "training.dynamics",
    "probe_few_labels": "probing.few_labels",
    "probe_layers": "probing.probes",
    "probe_models": "training.dynamics",
    "probe_neighbours": "probing.neighbours",
    "probe_on_cluster": "probing.streaming",
    "probe_permuted": "probing.controls",
    "probe_positions": "explaining.positions",
    "probe_prefixes": "explaining.positions",
    "probe_shift": "training.shift",
    "probe_slices": "explaining.positions",
    "probe_streaming": "probing.streaming",
    "probe_svm": "probing.kernel",
    "probe_targets": "probing.targets",
    "published": "core.published",
    "record": "features.hooks",
    "register_auto_classes": "models.auto",
    "refit_after": "explaining.ablations",
    "regret": "explaining.scores",
    "resample": "explaining.parts",
    "results_folder": "app.runs",
    "sample": "sampling.sampling",
    "score_layers": "explaining.scores",
    "second_view": "images.views",
    "selectivity": "probing.controls",
    "skip": "explaining.parts",
    "spread": "core.draws",
    "summarise_runs": "core.seeds",
    "summarise_seeds": "core.seeds",
    "summarise_shift": "training.shift",
    "summarise_shift_runs": "training.shift",
    "surprisal": "models.losses",
    "surprise": "models.losses",
    "tokenize": "images.tokens",
    "tuned_lens": "explaining.tuned_lens",
    "window": "explaining.edits",
    "windows": "explaining.ablations",
}
_RENAMED = {"Recipe": "PretrainConfig", "Tuning": "FinetuneConfig"}  # for one release
__all__ = [*_HOME, "figures"]


def __getattr__(name: str):
    if name in _RENAMED:
        warnings.warn(f"igpt_lab.{name} is now called {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name in _HOME:
        return getattr(importlib.import_module(f"igpt_lab.{_HOME[name]}"), name)
    if name == "figures":
        return importlib.import_module(f"igpt_lab.{name}")
    did_you_mean = importlib.import_module("igpt_lab.core.values").did_you_mean
    raise AttributeError(f"igpt_lab has no {name!r}; {did_you_mean(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(["__version__", *__all__])


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext igpt_lab`: a cell that fails says first, in a line, what to do."""
    importlib.import_module("igpt_lab.core.display").explain_errors(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """`%unload_ext igpt_lab`: errors are shown as before."""
    importlib.import_module("igpt_lab.core.display").leave_errors(ipython)
