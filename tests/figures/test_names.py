"""Names from anywhere in figures: drawn as they are, or plainly not; never as markup, and never in a broken file."""

import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from packaging.version import Version
from test_style import compared_table, drawings

from igpt_lab.core.display import MODEL
from igpt_lab.figures import FIGURES, Figure, gallery, layer_curve, model_comparison, read_table, redraw, save_figure
from igpt_lab.figures.names import as_label, fonts_of, letters
from igpt_lab.figures.style import STYLES, in_style, render
from tables import RECORD, layer_table

HOSTILE = "_cost $5 to $x^2$\x1b[31m\n]]><x> \\frac{" + "long " * 60
TITLE = f"\udce9 {HOSTILE}"  # a letter that is not UTF-8, which a table cannot hold
MEANT = {
    MODEL,
    *"chosen fixed transformers interaction standardised unscaled converged average drop".split(),
    "100 iterations",
    "raw pixels",
}
MEANT |= {"chosen layer", "last layer", "t", "n", ""}
MEANT |= {"block", "attention", "mlp", "head", "attentive", "mean", "drop_change"}  # parts left out, probes, a measure


def renamed(value):
    """The arguments of a figure with every name in them made hostile, those that are different still different."""
    if isinstance(value, str):
        return value if value in MEANT else HOSTILE + value
    if isinstance(value, list | tuple):
        return [renamed(item) for item in value]
    if isinstance(value, dict):
        return {renamed(name): item for name, item in value.items()}
    if isinstance(value, pd.DataFrame):
        table = value.map(renamed)
        if list(map(str, value.index)) == list(value.columns):  # a confusion matrix
            return table.set_axis(renamed(list(value.index))).set_axis(renamed(list(value.columns)), axis=1)
        return table
    return value


@pytest.mark.parametrize("name", FIGURES)
def test_every_name_in_every_figure_is_drawn_as_a_label(name):
    arguments, options, _ = drawings()[name]
    if "title" in options:
        options["title"] = TITLE
    options = {key: item if key in ("comparison", "title") else renamed(item) for key, item in options.items()}
    if name == "neighbour_gallery":
        options["nearest"] = {HOSTILE + key: item for key, item in options["nearest"].items()}
    figure = FIGURES[name](*renamed(list(arguments)), **options).get_figure(root=True)
    svg = render(figure, "svg")
    ET.fromstring(svg)
    assert b"\x1b" not in svg and render(figure, "pdf") and render(figure, "png")
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert not any(text.get_parse_math() for text in texts)
    lines = [line for text in texts for line in text.get_text().split("\n")]
    with in_style("paper"):
        assert max(map(len, lines)) <= 2 * letters()
    hostile = [line for line in lines if "cost" in line]
    if name not in ("geometry_curves", "cka_map", "completion_gallery", "surprise_gallery", "few_label_curve"):
        assert hostile, lines
    assert not any(line.startswith("_") for line in hostile)


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    table = layer_table().replace({"random network": "_hidden", "raw pixels": "$a$"})
    legend = [text.get_text() for text in layer_curve(table).get_legend().get_texts()]
    assert "\u200b_hidden" in legend and "$a$" in legend


def test_a_dollar_in_a_user_s_own_axes_is_a_dollar():
    ax = layer_curve(layer_table(), title="$5 and $6", ax=Figure().add_subplot())
    assert not any(text.get_parse_math() for text in ax.findobj(Text))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=200), st.sampled_from(list(STYLES)))
def test_any_text_as_a_label(name, style):
    with in_style(style):
        label, room = as_label(name), max(31, int(0.45 * letters()))
    assert len(label) <= room + 1 and not label.startswith("_") and label.encode() is not None
    assert label.isprintable() or not re.search("[\x00-\x1f\x7f-\x9f]", label)
    ET.fromstring(f"<x><!-- {label.replace('--', '')} --></x>".replace("- -->", " -->"))
    if len(name) < room / 2 and name.isprintable() and not name.startswith("_") and "\ufffe" not in name:
        assert label == name


NUL = "\0" if Version(pd.__version__) >= Version("3.1") else "\1"  # at which an older pandas ends a name
ODD = [
    f"a{NUL}b",
    "a\rb",
    "a\r\nb",
    'q"u,o',
    "NaN",
    "None",
    "\ufeffx",
    " x ",
    "1",
    "x;y\tz",
    "\u2028",
    "\x1a",
    "सिक्",
    "👩\u200d👧",
    "_",
]


def test_odd_names_come_back_from_a_csv_and_are_drawn_in_all_kinds_of_files(tmp_path):
    table = compared_table().replace(dict(zip(["one", "two", "random network"], ODD[:3], strict=True)))
    table = pd.concat([table.replace(dict(zip(ODD[:3], ODD[i : i + 3], strict=True))) for i in range(0, len(ODD), 3)])
    files = save_figure(model_comparison(table), tmp_path / "a", data=table, record=RECORD)
    again = redraw(files[-1], tmp_path / "b")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]
    read = read_table(files[3].read_bytes())
    assert read.model.tolist() == table.model.tolist() and read.control.tolist() == table.control.tolist()
    ET.parse(files[2])


def test_long_names_keep_both_ends_and_room_for_the_lines():
    names = [f"models/{'a-long-name-' * 30}{i}" for i in range(2)]
    ax = model_comparison(compared_table().replace({"one": names[0], "two": names[1]}))
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert len(set(labels)) == 2 and all(label.startswith("models/a-long") and "…" in label for label in labels)
    ax.figure.draw_without_rendering()
    assert ax.get_window_extent().width > 0.15 * ax.figure.bbox.width


def lacking() -> tuple[str, str]:
    """A letter that DejaVu Sans lacks and a font that comes with matplotlib has, and that font."""
    own, other = (FT2Font(font_manager.findfont(name)).get_charmap() for name in ("DejaVu Sans", "STIXNonUnicode"))
    return chr(min(set(other) - set(own))), "STIXNonUnicode"


def test_letters_that_the_font_lacks_are_from_an_installed_one(recwarn, tmp_path):
    letter, font = lacking()
    assert font in fonts_of(f"a{letter}") and fonts_of("é ü → plain") == fonts_of("plain") == ()
    table = layer_table().replace("random network", f"a{letter}")
    files = save_figure(layer_curve(table), tmp_path / "a", data=table, record=RECORD)
    again = redraw(files[-1], tmp_path / "b")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]
    assert not [str(warning.message) for warning in recwarn if "missing from font" in str(warning.message)]


def test_files_are_named_by_the_stem_and_a_home_folder_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    figure, options = gallery(np.zeros((2, 3, 3), np.uint8)), {"data": pd.DataFrame({"x": [1]}), "record": RECORD}
    for stem in ("~/curve.png", "~/curve.json", "~/curve"):
        assert [file.name for file in save_figure(figure, stem, **options)] == [
            f"curve.{kind}" for kind in ("png", "pdf", "svg", "csv", "json")
        ]
    assert len(list(tmp_path.iterdir())) == 5 and redraw("~/curve.json", "~/a.b/c.svg")[0] == tmp_path / "a.b/c.png"
    assert save_figure(figure, tmp_path / "v1.2", **options)[0].name == "v1.2.png"
    for file in tmp_path.glob("curve.*"):  # as an older version named them
        file.rename(tmp_path / f"old.png{file.suffix}")
    assert redraw(tmp_path / "old.png.json")[-1] == tmp_path / "old.png.json"
    assert redraw(tmp_path / "old.png.json", tmp_path / "talk" / "old.png")[0].name == "old.png.png"
    with pytest.raises(ValueError, match="~nosuchuser"):
        save_figure(figure, "~nosuchuser/curve", **options)
    for stem in ("", ".", "a/.."):
        with pytest.raises(ValueError, match="has no name at its end; expected one for the five files"):
            save_figure(figure, stem, **options)
    for stem in (None, 3):
        with pytest.raises(TypeError, match=f"stem={stem} is of type .*; expected a string or a path"):
            save_figure(figure, stem, **options)
    with pytest.raises(TypeError, match=r"record='curve' is of type str; expected a record such as lab\.RunRecord"):
        save_figure(figure, tmp_path / "a", data=options["data"], record="curve")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse the name")
def test_names_that_are_not_utf_8_work_for_files_and_are_refused_by_name_in_tables(tmp_path):
    figure = gallery(np.zeros((2, 3, 3), np.uint8))
    name = "caf\udce9"  # as Python reads the byte E9 in a file's name
    files = save_figure(figure, tmp_path / name, data=pd.DataFrame({"x": [1]}), record=RECORD)
    assert all(file.is_file() for file in files)
    for data in ({"x": [name]}, pd.DataFrame({"x": [name]}, dtype=object)):
        with pytest.raises(ValueError, match=r"caf\\udce9.* is not UTF-8 text"):
            save_figure(figure, tmp_path / "b", data=data, record=RECORD)
    titled = layer_curve(layer_table(), title=name)
    with pytest.raises(ValueError, match=r"caf\\udce9.* is not UTF-8 text"):
        save_figure(titled, tmp_path / "b", data=layer_table(), record=RECORD)
    assert not list(tmp_path.glob("b.*")) and render(titled.figure, "svg")
