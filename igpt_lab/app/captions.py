"""The words of a report: headings and captions of figures, names of tables and columns; no key is shown as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from igpt_lab.app.saved import SavedFigure

CAPTIONS = {  # by the function that drew a figure, in the order in which they are shown: its heading and its caption
    "layer_curve": (
        "Accuracy over depth",
        "Test accuracy of a linear probe on each layer, with 95% intervals over test images. Ring: the layer that "
        "validation chose. Bar below: the layers that may be the best. Of controls with several draws the mean and "
        "the range.",
    ),
    "layer_curves": (
        "Accuracy over depth of several networks",
        "Test accuracy of a linear probe on each layer of several networks, with 95% intervals over test images. "
        "Rings: the layers that validation chose.",
    ),
    "bits_curve": (
        "What each layer knows, in bits",
        "What a linear readout of a state says about each target, in bits: the target's entropy H less the log loss "
        "on test images, with 95% intervals over images.",
    ),
    "target_curves": (
        "Numbers about an image over depth",
        "R² of a ridge regression on each layer for numbers about an image, with 95% intervals over test images. "
        "Large marks: the layer that training images chose.",
    ),
    "selectivity": (
        "Selectivity over depth",
        "Accuracy, accuracy on labels without meaning, and their difference, the selectivity.",
    ),
    "position_map": (
        "Accuracy by position",
        "Test accuracy of a linear probe on single states, by position and layer. Rings: the layers that validation "
        "chose.",
    ),
    "prefix_curve": (
        "Accuracy by share of the image seen",
        "Test accuracy of a linear probe on the mean over the first states: a line for each share of the image that "
        "they cover. Bands: 95% intervals over test images.",
    ),
    "attentive_curve": (
        "A probe that attends, beside the mean",
        "A probe that attends to a layer's states against one of their mean, of as many parameters. Dots are seeds, "
        "lines their means; bands: 95% intervals over test images.",
    ),
    "few_label_curve": (
        "Accuracy with few labels",
        "Test accuracy over labels per class: mean over draws, which are the dots, and its interval.",
    ),
    "protocol_curves": (
        "What the protocol changes",
        "The layer curve in every setting of the protocol, hollow where a probe did not converge, and what each "
        "choice changes, with 95% intervals over test images.",
    ),
    "geometry_curves": (
        "Geometry over depth",
        "Measures of each layer that need no probe, with 95% intervals over images.",
    ),
    "leave_out_curve": (
        "Parts left out",
        "What leaving out a block, its attention or its MLP costs: nats of the next pixel, and points of the "
        "unchanged probe at its layer, with 95% intervals over test images.",
    ),
    "head_map": (
        "Heads left out",
        "Nats of the next pixel that leaving out each head costs.",
    ),
    "window_curve": (
        "Windows of attention",
        "What hiding the pixels beyond a radius costs, and in which blocks, with 95% intervals over test images.",
    ),
    "cka_map": (
        "Similarity of layers",
        "Linear CKA between layers: 1 where they differ by a rotation and a scale.",
    ),
    "fine_tuning": (
        "Fine-tuning",
        "Test accuracy of each method, and probes on all layers before and after.",
    ),
    "training_dynamics": (
        "Features while the model trains",
        "How features form: accuracy over the loss, and the layer curve at every checkpoint.",
    ),
    "seed_curves": (
        "Seeds of pretraining",
        "Several seeds of pretraining: accuracy over relative depth, the mean thick. Below, the chosen layer and its "
        "drop to the last: dots are seeds, coloured bars the 95% t interval over seeds, grey bars the 95% interval "
        "over test images of one seed. Image noise that all seeds share is not in the coloured bars.",
    ),
    "shift_curves": (
        "Corrupted test images",
        "Probes of clean images on corrupted test images: the layer that clean images chose, and the best on these. "
        "Bars: 95% t intervals over seeds of pretraining; bands: 95% over test images of one seed.",
    ),
    "shift_points": (
        "Corrupted test images, by point of the block",
        "The same for every point of the block, on one scale.",
    ),
    "model_comparison": (
        "Models side by side",
        "Models side by side: the layer that validation chose, the last layer, and controls, with 95% intervals over "
        "test images.",
    ),
    "lens_curve": (
        "What each layer says about the next pixel",
        "What each layer says about the next pixel, read by the model's own head, with 95% intervals over images, and "
        "where it was given the accuracy of a linear probe for the class.",
    ),
    "lens_strip": (
        "One image through depth",
        "One image through depth: the mean colour that each layer expects at every pixel, the nats of the true one, "
        "and the layer at which the most probable colour settles.",
    ),
    "offset_maps": (
        "Where heads look",
        "Where each head looks, measured from the predicted pixel: mean share of attention over images, one colour "
        "scale for all heads.",
    ),
    "attention_depth": (
        "Distance and entropy of attention",
        "Mean distance and entropy of attention, a dot for each head with its 95% interval over images, beside "
        "uniform attention over what is visible.",
    ),
    "attention_from": (
        "Where heads look in one image",
        "Where each head looks in one image from the marked pixel; what comes later is hatched.",
    ),
    "confusion_matrix": (
        "Confusion matrix",
        "Test images by their true class (rows) and the predicted one (columns).",
    ),
    "feature_map": (
        "Images on a plane",
        "Images on the plane that keeps most of their features' variance.",
    ),
    "completion_gallery": (
        "Completions",
        "What the model was given, what it drew, and what the image was.",
    ),
    "gallery": (
        "Images",
        "Images.",
    ),
    "row_gallery": (
        "Images by setting",
        "Images, a row for each setting.",
    ),
    "neighbour_gallery": (
        "Nearest training images",
        "Images beside the nearest ones of the training set: does the model repeat what it saw?",
    ),
    "surprise_gallery": (
        "Surprise of each pixel",
        "Surprise of every pixel after the pixels before it, in bits.",
    ),
}
TABLES = {  # by the name of a table that no figure shows
    "answers": "The seven predictions and their answers",
    "claims": "What was claimed, and its p values corrected for their number",
    "controls": "Controls",
    "likeness": "Samples beside real images",
    "poolings": "Poolings",
    "probe_layers": "Every layer against the chosen one",
    "refit": "Probes that are fitted again after an edit",
    "scores": "Scores of layers that need no labels",
    "scores_regret": "What is lost where a score picks the layer",
    "reference": "This run against the shipped one",
}
COLUMNS = {
    "low": "95% from", "high": "95% to", "n": "images", "n_test": "test images", "n_train": "training images",
    "n_validation": "held-out images", "n_features": "features", "n_images": "images",
    "p_value": "p", "layer_rule": "layer by", "k": "labels per class", "in_peak_set": "may be the best",
    "within_error": "within one standard error", "test_r2": "test R²", "validation_r2": "validation R²",
    "log_loss": "held-out bits", "minus_chosen": "less the chosen layer", "minus_last": "less the last layer",
    "peak": "may be the best",
}  # fmt: skip


def place(figure: SavedFigure) -> tuple[int, bool, str]:
    """Where a figure stands on the page: in the order of CAPTIONS; of one function's, its namesake first."""
    order = list(CAPTIONS)
    number = order.index(figure.function) if figure.function in CAPTIONS else len(order)
    return number, figure.name != figure.function, figure.name


def headings(figures: Sequence[SavedFigure], run: str) -> list[str]:
    """A heading for each figure, in words; its file's name ends those that would be the same."""
    heads = [_heading(figure, run) for figure in figures]
    times, seen = Counter(heads), set()
    for i, figure in enumerate(figures):
        if times[heads[i]] > 1 and heads[i] in seen:
            heads[i] = f"{heads[i]} ({plain(figure.name)})"
        seen.add(heads[i])
    return heads


def _heading(figure: SavedFigure, run: str) -> str:
    """What its function shows, and what the title that was drawn says beyond the run's."""
    head, _ = CAPTIONS.get(str(figure.function), (plain(figure.name), ""))
    arguments = figure.facts.get("drawing", {}).get("arguments", {})
    title = arguments.get("title") if isinstance(arguments, dict) else ""
    if not isinstance(title, str) or title in ("", run):
        return head
    own = title.removeprefix(f"{run}: ")
    return head if own.lower() in head.lower() else f"{head}: {own}"


def caption(figure: SavedFigure) -> str:
    """What a figure shows, in a sentence or some; "" of one that is not of this package."""
    return CAPTIONS.get(str(figure.function), ("", ""))[1]


def table_name(name: str) -> str:
    """The name of a table in words."""
    return TABLES.get(name, plain(name))


def column_name(name: str) -> str:
    """The name of a column in words."""
    for ending, words in (
        ("_low", ", 95% from"),
        ("_high", ", 95% to"),
        ("_p", ", p"),
        ("_all", " (all layers together)"),
    ):
        if name.endswith(ending) and name != ending:
            return column_name(name.removesuffix(ending)) + words
    return COLUMNS.get(name, name.replace("_", " "))


def plain(name: str) -> str:
    """The name of a file in words."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]
