"""Figures: a table or images -> Axes -> files. Nothing here sees a model, and torch is never imported.

Each function that plots takes the `Options`, such as `style`: `paper` (one column of a page, the default), `wide` (two
columns) or `talk`.
A notebook shows what they return, Axes or a figure, as the png that `save_figure` writes.

A new figure touches two places: its function, under `@plotting`, in a file such as `curves`; its name in the imports
and `__all__` below. From there on `save_figure` and `redraw` know it.
"""

import warnings

from igpt_lab.core.display import MODEL
from igpt_lab.figures.ablations import (
    ACCURACY_COLUMNS,
    HEAD_COLUMNS,
    LEAVE_OUT_COLUMNS,
    WINDOW_COLUMNS,
    head_map,
    leave_out_curve,
    window_curve,
)
from igpt_lab.figures.attention import (
    DEPTH_COLUMNS,
    FROM_COLUMNS,
    OFFSET_COLUMNS,
    attention_depth,
    attention_from,
    offset_maps,
)
from igpt_lab.figures.comparisons import COMPARED_COLUMNS, METHOD_COLUMNS, fine_tuning, model_comparison
from igpt_lab.figures.controls import SELECTIVITY_COLUMNS, selectivity
from igpt_lab.figures.curves import FEW_COLUMNS, LAYER_COLUMNS, few_label_curve, geometry_curves, layer_curve
from igpt_lab.figures.dynamics import DYNAMICS_COLUMNS, training_dynamics
from igpt_lab.figures.galleries import (
    LETTER,
    STRIP,
    completion_gallery,
    gallery,
    neighbour_gallery,
    row_gallery,
    surprise_gallery,
)
from igpt_lab.figures.lenses import BASELINE_COLUMNS, LENS_COLUMNS, STRIP_COLUMNS, lens_curve, lens_strip
from igpt_lab.figures.maps import CKA_COLUMNS, FEATURE_COLUMNS, cka_map, confusion_matrix, feature_map
from igpt_lab.figures.networks import NETWORK_COLUMNS, layer_curves
from igpt_lab.figures.options import Options
from igpt_lab.figures.positions import (
    ATTENTIVE_COLUMNS,
    POSITION_COLUMNS,
    PREFIX_COLUMNS,
    attentive_curve,
    position_map,
    prefix_curve,
)
from igpt_lab.figures.protocol import EFFECT_COLUMNS, PROTOCOL_COLUMNS, protocol_curves
from igpt_lab.figures.readouts import BITS_COLUMNS, bits_curve
from igpt_lab.figures.saving import read_figure, read_table, redraw, save_figure
from igpt_lab.figures.seeds import RUN_COLUMNS, seed_curves
from igpt_lab.figures.shift import SHIFT_COLUMNS, SHIFT_MEASURES, shift_curves, shift_points
from igpt_lab.figures.style import FIGURES, LINE_STYLES, STYLES, Figure
from igpt_lab.figures.targets import TARGET_COLUMNS, target_curves

__all__ = [
    "attention_depth",
    "attention_from",
    "attentive_curve",
    "bits_curve",
    "cka_map",
    "completion_gallery",
    "confusion_matrix",
    "feature_map",
    "few_label_curve",
    "fine_tuning",
    "gallery",
    "geometry_curves",
    "head_map",
    "layer_curve",
    "layer_curves",
    "leave_out_curve",
    "lens_curve",
    "lens_strip",
    "model_comparison",
    "neighbour_gallery",
    "offset_maps",
    "position_map",
    "prefix_curve",
    "protocol_curves",
    "row_gallery",
    "seed_curves",
    "selectivity",
    "shift_curves",
    "shift_points",
    "surprise_gallery",
    "target_curves",
    "training_dynamics",
    "window_curve",
    "ACCURACY_COLUMNS",
    "ATTENTIVE_COLUMNS",
    "BASELINE_COLUMNS",
    "BITS_COLUMNS",
    "CKA_COLUMNS",
    "COMPARED_COLUMNS",
    "DEPTH_COLUMNS",
    "DYNAMICS_COLUMNS",
    "EFFECT_COLUMNS",
    "FEATURE_COLUMNS",
    "FEW_COLUMNS",
    "FIGURES",
    "FROM_COLUMNS",
    "Figure",
    "HEAD_COLUMNS",
    "LAYER_COLUMNS",
    "LEAVE_OUT_COLUMNS",
    "LENS_COLUMNS",
    "LETTER",
    "LINE_STYLES",
    "METHOD_COLUMNS",
    "NETWORK_COLUMNS",
    "OFFSET_COLUMNS",
    "Options",
    "POSITION_COLUMNS",
    "PREFIX_COLUMNS",
    "PROTOCOL_COLUMNS",
    "RUN_COLUMNS",
    "SELECTIVITY_COLUMNS",
    "SHIFT_COLUMNS",
    "SHIFT_MEASURES",
    "STRIP",
    "STRIP_COLUMNS",
    "STYLES",
    "TARGET_COLUMNS",
    "WINDOW_COLUMNS",
    "read_figure",
    "read_table",
    "redraw",
    "save_figure",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> object:
    older = {"DRAWN_BY": ("FIGURES", FIGURES), "LOOKS": ("LINE_STYLES", LINE_STYLES | {"": LINE_STYLES[MODEL]})}
    if name not in older:
        raise AttributeError(f"igpt_lab.figures has no {name!r}; it has {', '.join(__all__)}")
    new, value = older[name]
    warnings.warn(
        f"figures.{name} is now figures.{new}; the old name is removed in 0.3", DeprecationWarning, stacklevel=2
    )
    return value
