"""Styles, and figures drawn again from their files: same bytes, no torch, letters in reach, colours told apart."""

import inspect
import itertools
import json
import os
import pydoc
import re
import signal
import subprocess
import sys
import zlib

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.layout_engine import ConstrainedLayoutEngine

import igpt_lab.figures as figures
from igpt_lab.app import cli
from igpt_lab.core.display import MODEL
from igpt_lab.figures.parts import figure_of
from igpt_lab.figures.protocol import EFFECT_STYLES, PROTOCOL_STYLES, TRANSFORMERS_STYLE
from igpt_lab.figures.style import LINE_STYLES, OTHERS, STYLES, render
from tables import (
    RECORD,
    attention_tables,
    attentive_table,
    bits_table,
    cka_table,
    drawn_table,
    geometry_table,
    layer_table,
    leave_out_table,
    lens_table,
    position_table,
    prefix_table,
    protocol_tables,
    seed_table,
    selectivity_table,
    shift_table,
    stopped_table,
    strip_table,
    target_table,
    window_table,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)
COMPARISON = {"chosen_layer": 1, "last_layer": 2, "difference": 0.1, "low": 0.02, "high": 0.18, "p_value": 0.004}


def few_table():
    rows = [(MODEL, k, d, "chosen", 5, 0.1 * k + 0.02 * d, True) for k in (1, 4) for d in range(3)]
    return pd.DataFrame(rows, columns=list(figures.FEW_COLUMNS)[:3] + ["layer_rule", "layer", *figures.FEW_COLUMNS[5:]])


def method_table():
    rows = [(m, k, d, 0.5 + 0.1 * d, 0.4, 0.7) for m in ("probe", "tuned") for k in ("all", "25") for d in range(2)]
    return pd.DataFrame(rows, columns=list(figures.METHOD_COLUMNS))


def dynamics_table():
    """The network before training and two checkpoints, layer 1 chosen."""
    steps = pd.DataFrame({"model": "m", "step": [0, 5, 10], "loss": [9.0, 2, 1], "loss_error": 0.1})
    layers = pd.DataFrame({"layer": [0, 1, 2], "test_accuracy": [0.3, 0.5, 0.4], "chosen": [False, True, False]})
    table = steps.merge(layers.assign(low=layers.test_accuracy - 0.1, high=layers.test_accuracy + 0.1), how="cross")
    return table.assign(test_accuracy=table.test_accuracy + table.step / 100)


def compared_table():
    return pd.concat([layer_table().assign(model=name) for name in ("one", "two")], ignore_index=True)


def places():
    return pd.DataFrame({"x": [0.0, 1, 2], "y": [1.0, 0, 1], "label": ["a", "b", "a"]})


def drawings():
    """A figure by every function that draws, with the table that is saved beside it."""
    tokens = pd.DataFrame(IMAGES[..., 0].reshape(4, -1))
    table, effects = protocol_tables()
    counts = pd.DataFrame([[3, 1], [0, 2]], pd.Index(["a", "b"], name="true"), ["a", "b"])
    marks = pd.DataFrame({"baseline": ["unigram", "b"], "nats": [3.5, 2.5]})
    mixed = layer_table().assign(in_peak_set=[True, True, False] + [None] * 5)
    return {
        **{name: ([table], {"title": "t"}, table) for name, table in attention_tables().items()},
        "layer_curves": ([{"a": mixed, "b": layer_table()}], {"controls": drawn_table(), "title": "t"}, mixed),
        "layer_curve": ([mixed], {"title": "t", "comparison": COMPARISON}, mixed),
        "few_label_curve": ([few_table()], {}, few_table()),
        "cka_map": ([cka_table()], {"names": ("one", "other")}, cka_table()),
        "geometry_curves": ([geometry_table()], {}, geometry_table()),
        "lens_curve": ([lens_table(), layer_table()], {"marks": marks, "title": "t"}, lens_table()),
        "lens_strip": ([strip_table()], {"title": "t"}, strip_table()),
        "selectivity": ([selectivity_table()], {"title": "t"}, selectivity_table()),
        "leave_out_curve": ([leave_out_table()], {"title": "t"}, leave_out_table()),
        "head_map": ([leave_out_table()], {"title": "t"}, leave_out_table()),
        "window_curve": ([window_table()], {"title": "t"}, window_table()),
        "position_map": ([position_table()], {"title": "t"}, position_table()),
        "prefix_curve": ([prefix_table()], {"title": "t"}, prefix_table()),
        "attentive_curve": ([attentive_table()], {"title": "t"}, attentive_table()),
        "bits_curve": ([bits_table()], {"title": "t", "relative": True}, bits_table()),
        "target_curves": ([target_table()], {"title": "t"}, target_table()),
        "protocol_curves": ([table, effects, stopped_table()], {"title": "t"}, table),
        "confusion_matrix": ([counts], {}, tokens),
        "feature_map": ([places()], {"names": ["a", "b", "none"], "explained": [0.5, 0.25], "note": "n"}, places()),
        "fine_tuning": ([method_table(), layer_table()], {}, method_table()),
        "training_dynamics": ([dynamics_table()], {"title": "t"}, dynamics_table()),
        "model_comparison": ([compared_table()], {"title": "t"}, compared_table()),
        "seed_curves": ([seed_table()], {"title": "t"}, seed_table()),
        "shift_curves": ([shift_table()], {"title": "t"}, shift_table()),
        "shift_points": ([shift_table()], {"measure": "drop_change", "title": "t"}, shift_table()),
        "gallery": ([IMAGES], {"columns": 2, "scale": 30, "titles": list("abcd"), "title": "t"}, tokens),
        "completion_gallery": ([IMAGES[:2], IMAGES[None].repeat(2, 0), IMAGES[:2]], {"prime_rows": 2}, tokens),
        "row_gallery": ([IMAGES.reshape(2, 2, 5, 5, 3)], {"labels": ["one", "two"]}, tokens),
        "neighbour_gallery": ([IMAGES], {"nearest": {"pixels": IMAGES[::-1], "features": IMAGES}}, tokens),
        "surprise_gallery": ([IMAGES], {"bits": np.linspace(0, 9, 100, dtype=np.float32).reshape(4, 5, 5)}, tokens),
    }


def test_every_function_that_draws_is_drawn_here():
    assert drawings().keys() == figures.FIGURES.keys()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_saved_figure_is_drawn_again_to_the_byte(name, tmp_path):
    arguments, options, data = drawings()[name]
    for style in ("paper", "talk"):
        made = figures.FIGURES[name](*arguments, **options, style=style)
        first = figures.save_figure(made, tmp_path / style / "a", data=data, record=RECORD)
        again = figures.redraw(first[-1], tmp_path / style / "b")
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in first]
    facts = json.loads((tmp_path / "talk" / "b.json").read_text())
    assert (facts["drawing"]["function"], facts["drawing"]["style"]) == (name, "talk") and facts["config"] == {"a": 1}
    paper = figures.redraw(tmp_path / "talk" / "b.json", tmp_path / "c", style="paper")
    assert [path.read_bytes() for path in paper] == [
        (tmp_path / "paper" / f"a{path.suffix}").read_bytes() for path in paper
    ]


@pytest.mark.parametrize("name", ["layer_curve", "protocol_curves"])
def test_the_last_bits_of_a_layout_change_no_byte(name, monkeypatch):
    arguments, options, _ = drawings()[name]
    lay_out = ConstrainedLayoutEngine.execute

    def lay_out_otherwise(engine, figure):
        lay_out(engine, figure)
        for box in (*(part.bbox_relative for part in figure.subfigs), *(ax._originalPosition for ax in figure.axes)):
            box.set_points(box.get_points() * (1 + 1e-14))

    kinds = ("png", "pdf", "svg")
    first = [render(figure_of(figures.FIGURES[name](*arguments, **options)), kind) for kind in kinds]
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lay_out_otherwise)
    assert [render(figure_of(figures.FIGURES[name](*arguments, **options)), kind) for kind in kinds] == first


@pytest.mark.parametrize("name", ["layer_curve", "few_label_curve", "geometry_curves", "fine_tuning"])
@pytest.mark.parametrize("word", ["", None])
def test_a_figure_saved_when_the_model_had_no_word_is_drawn_again_to_the_byte(name, word, tmp_path):
    arguments, options, data = drawings()[name]
    old = [table.assign(control=table.control.replace({MODEL: word})) if "control" in table else table
           for table in arguments]  # fmt: skip
    files = [figures.save_figure(figures.FIGURES[name](*tables, **options), tmp_path / end, data=tables[0],
                                 record=RECORD) for tables, end in ((arguments, "new"), (old, "old"))]  # fmt: skip
    again = figures.redraw(files[1][-1], tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files[1]]
    assert [path.read_bytes() for path in again[:3]] == [path.read_bytes() for path in files[0][:3]]
    table = figures.read_table((tmp_path / "old.csv").read_bytes())
    assert "control" not in table or table.control.tolist() == data.control.tolist()


def test_what_cannot_be_drawn_again_says_why(tmp_path):
    figure = figures.layer_curve(layer_table())
    (*_, file) = figures.save_figure(figure, tmp_path / "a", data=layer_table(), record=RECORD)
    csv = tmp_path / "a.csv"
    csv.write_text(csv.read_text().replace("0.8", "0.9"))
    with pytest.raises(ValueError, match="a.csv has changed since a.json was written"):
        figures.redraw(file)
    composed = figures.Figure()
    figures.layer_curve(layer_table(), ax=composed.add_subplot())
    (*_, file) = figures.save_figure(composed, tmp_path / "b", data=layer_table(), record=RECORD)
    with pytest.raises(ValueError, match="b.json does not say which function plotted it"):
        figures.redraw(file)
    with pytest.raises(
        ValueError, match=r"no style 'papre'; expected one of paper, wide, talk; did you mean 'paper'\?"
    ):
        figures.layer_curve(layer_table(), style="papre")


def test_older_names_warn():
    with pytest.warns(DeprecationWarning, match="figures.DRAWN_BY is now figures.FIGURES"):
        assert figures.DRAWN_BY is figures.FIGURES
    with pytest.warns(DeprecationWarning, match="figures.LOOKS is now figures.LINE_STYLES"):
        assert figures.LOOKS == figures.LINE_STYLES | {"": figures.LINE_STYLES[MODEL]}


def test_each_function_shows_its_own_name_help_and_arguments():
    for name, function in figures.FIGURES.items():
        assert getattr(figures, name) is function and name in figures.__all__
        assert function.__name__ == name and list(inspect.signature(function).parameters)[-1] == "options"
        page = pydoc.plain(pydoc.render_doc(function))
        assert f"{name}({next(iter(inspect.signature(function).parameters))}" in page and "see `Options`" in page
        assert inspect.getdoc(function).splitlines()[0] in page


EDIT = """
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for line in ("%load_ext autoreload", "%autoreload 2", "import plots", "made = plots.gallery; held = made(1)"):
    shell.run_cell(line)
file = Path("plots.py")
file.write_text(file.read_text().replace("first", "second, and longer"))
shell.run_cell("held = made(1)")
print(shell.user_ns["held"].get_title())
"""


def test_an_edited_function_is_reloaded_into_the_same_name(tmp_path):
    source = "from igpt_lab.figures.plotting import plotting\nfrom igpt_lab.figures.style import axes\n\n\n"
    source += "@plotting\ndef gallery(x):\n    ax = axes(x)\n"
    (tmp_path / "plots.py").write_text(source + "    ax.set_title('first')\n    return ax\n")
    environment = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", EDIT], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1:] == ["second, and longer"], done.stderr


def test_a_style_sets_width_and_letters():
    for name, style in STYLES.items():
        ax = figures.layer_curve(layer_table(), style=name)
        assert ax.figure.get_size_inches()[0] == style.width
        sizes = {text.get_fontsize() for text in [ax.xaxis.label, *ax.texts, *ax.get_legend().get_texts()]}
        assert sizes == {style.letter}
    height, width, _ = figures.gallery(IMAGES).images[0].get_array().shape
    for name, times in (("paper", 1), ("wide", 2), ("talk", 2)):  # whole png pixels
        size = figures.gallery(IMAGES, style=name).figure.get_size_inches() * 200
        np.testing.assert_allclose(size, [times * width, times * height], atol=0.02)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "name",
    "layer_curve few_label_curve cka_map geometry_curves fine_tuning selectivity seed_curves lens_curve "
    "lens_strip leave_out_curve head_map window_curve position_map prefix_curve attentive_curve "
    "attention_depth attention_from offset_maps bits_curve target_curves shift_curves shift_points".split(),
)
def test_all_words_are_inside_the_figure(name, style):
    arguments, options, _ = drawings()[name]
    figure = figures.FIGURES[name](*arguments, **options, style=style).get_figure(root=True)
    figure.draw_without_rendering()
    for ax in figure.axes:
        words = [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]
        words += ax.get_legend().get_texts() if ax.get_legend() else []
        for text in filter(lambda text: text.get_text() and text.get_visible(), words):
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, (style, text.get_text())


def test_text_is_text_in_a_pdf_and_outlines_in_an_svg(tmp_path):
    _, pdf, svg, *_ = figures.save_figure(
        figures.layer_curve(layer_table(), title="t"), tmp_path / "a", data=layer_table(), record=RECORD
    )
    content = pdf.read_bytes()
    assert b"/FontFile2" in content and b"/Type3" not in content and b"/Subtype /Image" not in content
    streams = re.findall(rb"stream\r?\n(.*?)endstream", content, re.S)
    assert any(b" Tf" in zlib.decompressobj().decompress(stream) for stream in streams if stream[:1] == b"x")
    drawn = svg.read_text()
    assert "<image" not in drawn and "<text" not in drawn and "font-family" not in drawn


def seen(colour: str, matrix) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour as somebody sees it whose cones differ: `matrix` on linear RGB."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(matrix) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / [0.9505, 1, 1.089], 216 / 24389))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


MACHADO = {  # Machado, Oliveira and Fernandes (2009), severity 1.0
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("styles", [[*LINE_STYLES.values(), *OTHERS], [*PROTOCOL_STYLES.values(), TRANSFORMERS_STYLE]])
def test_lines_are_told_apart_in_grey_and_by_colour_blind_readers(styles):
    forms = [(str(style["linestyle"]), style["marker"]) for style in styles]
    assert len(set(forms)) == len(forms)  # in grey print
    assert len({style["marker"] for style in EFFECT_STYLES.values()}) == 3
    for matrix in MACHADO.values():
        for one, other in itertools.combinations({style["color"] for style in styles}, 2):
            assert np.linalg.norm(seen(one, matrix) - seen(other, matrix)) > 9, (one, other)
    white = seen("white", np.eye(3))[0]
    assert all(white - seen(style["color"], np.eye(3))[0] > 25 for style in styles)  # none too pale for paper


def test_the_command_draws_all_figures_again_without_torch(tmp_path, request):
    kept = request.config.rootpath / "results" / "cifar10-xs-cifar10"
    arguments = ["figures", str(kept), "--style", "talk", "--out", str(tmp_path / "talk")]
    code = (
        f"import sys; from igpt_lab.app.cli import main; code = main({arguments}); print('torch' in sys.modules, code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=request.config.rootpath, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr
    made = {path.name for path in (tmp_path / "talk").iterdir()}
    assert {"layer_curve.pdf", "companions.csv", "protocol.svg"} <= made and "summary.json" not in made


def test_every_committed_figure_can_be_drawn_again(request):
    shipped = ("fashion-xs-fashion-mini", "cifar10-xs-cifar10", "studies")
    files = [file for name in shipped for file in (request.config.rootpath / "results" / name).glob("*.json")]
    assert len(files) > 30
    for file in files:
        if file.name != "summary.json":
            facts, _ = figures.read_figure(file)
            assert facts["drawing"]["function"] in figures.FIGURES, file


def test_a_folder_without_figures_is_told(tmp_path, capsys):
    assert cli.main(["figures", str(tmp_path)]) == 1
    assert "has no figures" in capsys.readouterr().err
    (tmp_path / "a.json").write_text('{"csv_sha256": ""}')
    (tmp_path / "a.csv").write_text("x\n1\n")
    assert cli.main(["figures", str(tmp_path)]) == 1
    assert "a.csv has changed" in capsys.readouterr().err


def test_ctrl_c_while_a_figure_is_saved_over_an_older_one_leaves_one_that_is_drawn_again(tmp_path, monkeypatch):
    stem, replace = tmp_path / "curve", os.replace

    def stopping(source, target):
        replace(source, target)
        if str(target).endswith(".csv"):
            signal.raise_signal(signal.SIGINT)

    table = layer_table()
    figures.save_figure(figures.layer_curve(table), stem, data=table, record=RECORD)
    other = table.assign(test_accuracy=table.test_accuracy / 2, low=table.low / 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stopping)
        figures.save_figure(figures.layer_curve(other), stem, data=other, record=RECORD)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    figures.redraw(stem.with_suffix(".json"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
