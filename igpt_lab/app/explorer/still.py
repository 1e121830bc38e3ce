"""The explorer's view without a widget: a line of text, and a page that a notebook keeps when its kernel is gone."""

from __future__ import annotations

import html
import io

import numpy as np
from PIL import Image

from igpt_lab.app.explorer.pictures import Pictures
from igpt_lab.app.explorer.views import NOTE, View, layer_curve
from igpt_lab.core.display import picture

IN_A_ROW = 24  # pictures of a class on the first page
ROWS = 10

# JupyterLab shows "model not found" for a widget of a kernel that is gone. The page lies before the widget: it goes
# while the widget is there, and the widget's place goes while it is not.
# Its ground is light in every theme, as its picture is.
COVER = """<style>
.igx-still { padding: 12px 16px; border-radius: 8px; background: #fff; }
.igx-still, .igx-still :is(tr, td, th) { background: #fff !important; color: #1f1f1f !important; }
.jp-OutputArea-child:has(.igx-still):has(+ .jp-OutputArea-child .igx) { display: none; }
.jp-OutputArea-child:has(.igx-still) + .jp-OutputArea-child:not(:has(.igx, [data-mime-type])) { display: none; }
</style>"""


def summarise(view: View) -> str:
    """What there is to see, in a line of text."""
    chosen = view.answers.chosen
    name = view.called[list(view.shown.layers).index(chosen)]
    row = view.answers.table.set_index("layer").loc[chosen]
    return (
        f"<Explorer {view.title}: {view.of}, point {view.point}, layers {view.called[0]}..{view.called[-1]}; "
        f"layer {name} chosen on validation, {row.test_accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]"
        f"{''.join(f'; {words}' for words in view.answers.doubts)}>"
    )


def first_page(facts: dict, pictures: Pictures, labels: np.ndarray) -> str:
    """What there is to see before probes are fitted: pictures of each class, as HTML without scripts."""
    words = f"{facts['of']}. The probes were not fitted yet. Run this cell in JupyterLab to explore."
    mosaic = "" if pictures.pixels is None else _mosaic(pictures.gallery, labels)
    title = html.escape(facts["title"])
    return f"{COVER}<div class='igx-still'><strong>{title}</strong><br>{html.escape(words)}<br>{mosaic}</div>"


def _mosaic(pixels: np.ndarray, labels: np.ndarray) -> str:
    """The first pictures of each class, a class a row, as HTML."""
    height, width = pixels.shape[1:3]
    classes = np.unique(labels)[:ROWS]
    drawn = np.full((len(classes), IN_A_ROW, *pixels.shape[1:]), 255, np.uint8)
    for row, label in zip(drawn, classes, strict=True):
        first = np.flatnonzero(labels == label)[:IN_A_ROW]
        row[: len(first)] = pixels[first]
    drawn = np.moveaxis(drawn, 2, 1).reshape(len(classes) * height, IN_A_ROW * width, *pixels.shape[3:])
    png = io.BytesIO()
    Image.fromarray(drawn).save(png, "png")
    return picture(png.getvalue(), words="pictures of each class, a class a row").replace("height:56px", "width:700px")


def page(view: View) -> str:
    """What there is to see without a widget: the curve and its numbers, as HTML without scripts."""
    figure = layer_curve(view)[0].get_figure(root=True)
    png = figure._repr_mimebundle_()["image/png"]
    rows = "".join(
        f"<tr><td>{html.escape(name)}{' (chosen)' if row.layer == view.answers.chosen else ''}</td>"
        f"<td>{row.test_accuracy:.1%}</td><td>[{row.low:.1%}, {row.high:.1%}]</td></tr>"
        for name, row in zip(view.called, view.answers.table.itertuples(), strict=True)
    )
    doubts = "".join(f"{words[0].upper()}{words[1:]}. " for words in view.answers.doubts)
    words = f"{view.of}, {view.point}. {doubts}Run this cell in JupyterLab to explore. {NOTE}"
    return (
        f"{COVER}<div class='igx-still'><strong>{html.escape(view.title)}</strong><br>{html.escape(words)}<br>"
        f'<img alt="accuracy over depth" width="700" src="data:image/png;base64,{png}">'
        f"<details><summary>accuracy of every layer</summary><table><tr><th>layer</th><th>accuracy</th>"
        f"<th>95%</th></tr>{rows}</table></details></div>"
    )
