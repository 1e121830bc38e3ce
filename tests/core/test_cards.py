"""Cards say what the objects hold, escaped, in the page's own colours, and the text beside them says the same."""

import io
import re
from base64 import b64decode
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from IPython.core.formatters import DisplayFormatter
from PIL import Image

import igpt_lab as lab
from igpt_lab.core.display import MODEL, card, span, spark
from igpt_lab.core.provenance import digest
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.image_sets import TokenSet
from igpt_lab.probing.few_labels import FewLabelResult
from igpt_lab.probing.results import Comparison, ProbeResult


def shown(thing) -> tuple[str, str, dict]:
    """Text, HTML and the facts in it, as IPython would show them."""
    bundle, _ = DisplayFormatter().format(thing)
    page = bundle["text/html"]
    assert not re.search(r"\bcolor:|#(?!888)[0-9a-f]{3,6}\b|white|black", page)  # no colours of its own
    tree = ElementTree.fromstring(f"<p>{page}</p>")
    cells = ["".join(cell.itertext()) for cell in tree.iter("td")]
    return bundle["text/plain"], "".join(tree.itertext()), dict(zip(cells[::2], cells[1::2], strict=True))


def probe_table(converged=(True, True, False)):
    table = pd.DataFrame({"layer": [0, 1, 2], "test_accuracy": [0.5, 0.8, 0.7], "converged": converged})
    table = table.assign(low=table.test_accuracy - 0.05, high=table.test_accuracy + 0.05, control=MODEL, n_train=600)
    table = table.assign(validation_accuracy=table.test_accuracy, n_validation=600)
    return table.assign(n_test=400, in_peak_set=[False, True, True], chosen=[False, True, False])


def test_a_probe_result_says_which_layer_is_chosen():
    text, _, facts = shown(ProbeResult(probe_table(), {}, 1))
    assert facts == {
        "chosen layer": "1 of 0..2, by validation: 80.0% [75.0%, 85.0%]",
        "last layer": "2: 70.0% [65.0%, 75.0%]", "may be the best": "1, 2", "not converged": "2",
        "images": "600 train, 400 test",
    }  # fmt: skip
    assert text.startswith("<ProbeResult: chosen layer 1 of 0..2, ") and "not converged 2" in text
    assert "not converged" not in shown(ProbeResult(probe_table(True), {}, 1))[2]
    few = shown(ProbeResult(probe_table().assign(n_validation=90), {}, 1))[2]
    assert few["beware"].startswith("a poor choice: one standard error is 4.2 points on 90 held-out images")
    control = ProbeResult(probe_table().assign(control="raw pixels"), {}, 1)
    assert shown(control)[2] == {"control": "raw pixels"} | facts


def test_a_comparison_has_both_intervals():
    ends = {"low": 0.0302, "high": 0.051, "choice_low": 0.026, "choice_high": 0.053}
    drop = Comparison(12, 20, 0.8545, 0.814, 0.0405, **ends, only_chosen=312, only_last=150, n_test=4000, p_value=3e-13)
    text, _, facts = shown(drop)
    assert facts["difference"] == "+4.0 points [3.0, 5.1] over test images, [2.6, 5.3] with the choice"
    assert facts["chosen layer"] == "12: 85.5%" and facts["p"] == "3e-13 (McNemar's exact test, 4,000 test images)"
    assert text.startswith(
        "<Comparison: chosen layer 12: 85.5%; last layer 20: 81.4%; difference +4.0 points [3.0, 5.1]"
    )
    assert "with the choice" not in repr(replace(drop, choice_low=float("nan")))


def test_a_summary_is_in_percent_and_latex_is_escaped():
    table = probe_table().assign(layer=["in_put", "mid%", "out"])
    lines = repr(ProbeResult(table, {}, "mid%").summary()).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["chosen", "layer", "mid%", "80.0", "[75.0,", "85.0]"],
        ["first", "layer", "in_put", "50.0", "[45.0,", "55.0]"],
        ["last", "layer", "out", "70.0", "[65.0,", "75.0]"],
    ]
    latex = ProbeResult(table, {}, "mid%").summary().to_latex()
    rows = [row.split(" & ") for row in latex.splitlines() if " & " in row]
    assert rows[1] == ["chosen layer", r"mid\%", r"80.0 [75.0, 85.0] \\"] and rows[2][1] == r"in\_put"
    assert not re.search(r"(?<!\\)[%_#$]", latex) and latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1
    one = ProbeResult(probe_table()[1:2].assign(control="raw pixels"), {}, 1)
    assert len(one.summary().table) == 1 and "80.0 [75.0, 85.0]" in one.summary()._repr_html_()
    ends = {"low": 0.0302, "high": 0.051, "choice_low": 0.026, "choice_high": 0.053}
    drop = Comparison(12, 20, 0.8545, 0.814, 0.0405, **ends, only_chosen=312, only_last=150, n_test=4000, p_value=3e-13)
    assert drop.summary().table["test accuracy"].tolist()[2:] == ["+4.0 [3.0, 5.1]", "3e-13", "4,000"]
    assert "+4.0 [3.0, 5.1]" in repr(drop.summary()) and r"layer 12 (\%) & 85.5" in drop.summary().to_latex()


def test_features_a_peak_set_and_a_paired_difference_have_cards():
    features = lab.Features({0: np.eye(4), 1: np.ones((4, 2))}, [0, 1, 1, 0], names=("<b>", "dog"))
    text, page, facts = shown(features)
    assert facts == {"rows": "4", "classes": "2: <b>, dog", "layers": "0, 1", "features": "2 to 4"}
    assert text == "<Features: 4 rows, 2 classes, layers 0, 1>" and page.startswith("Features")
    many = lab.Features({0: np.eye(12)}, np.arange(12))
    assert shown(many)[2]["classes"] == "12: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..." and shown(many)[2]["features"] == "12"
    correct = {layer: np.arange(400) < count for layer, count in enumerate((100, 300, 310, 120))}
    text, _, facts = shown(lab.peak_set(correct))
    assert facts["may be the best"] == "2 of 0..3" and facts["level"] == "95% for all layers together, 400 test images"
    result = ProbeResult(probe_table(), correct, 1)
    assert lab.peak_set(result) == lab.peak_set(correct)
    pd.testing.assert_frame_equal(lab.layer_table(result, chosen=2), lab.layer_table(correct, chosen=2))
    text, _, facts = shown(result.choice)
    assert text.startswith("<Choice: layer 1 of 3 layers; validation accuracy 80.0%, standard error 1.6%, 600 held-out")
    assert facts["layer"] == "1 of 3 layers" and "tied" not in facts
    paired = lab.compare(correct[2], correct[0])
    text, _, facts = shown(paired)
    assert facts["accuracy"] == "77.5% of a, 25.0% of b" and facts["only one right"] == "210 images a, 0 b"
    assert facts["difference"].startswith("+52.5 points [") and text.startswith("<PairedDifference: accuracy 77.5%")


def test_drawn_images_and_a_processor_have_cards(tiny):
    drawn = lab.sample(tiny, 3, seed=1, progress=False)
    text, _, facts = shown(drawn)
    assert facts["images"] == "3 of 16 pixels" and text.startswith("<Drawn: images 3 of 16 pixels; seeds ")
    assert facts["mean surprise"] == f"{-drawn.log_p.mean():.3f} nats a pixel" and "not finished" not in facts
    stopped = replace(drawn, rows=np.array([4, 2, 0]), log_p=np.full_like(drawn.log_p, np.nan))
    assert shown(stopped)[2]["not finished"] == "2" and "mean surprise" not in shown(stopped)[2]
    text, _, facts = shown(tiny.processor)
    assert facts == {"images": "4 x 4 pixels, bilinear, squash", "palette": "8 colours", "gives": "palette indices"}
    assert text.startswith(f"<{type(tiny.processor).__name__}: images 4 x 4 pixels")


def test_a_spark_has_the_values_and_a_ring_at_the_best():
    drawn = ElementTree.fromstring(spark([0.5, 0.8, 0.7], 1, words='"a" < b'))
    points = [tuple(map(float, point.split(","))) for point in drawn.find(".//polyline").get("points").split()]
    heights = [35 - y for _, y in points]
    assert [x for x, _ in points] == [5, 100, 195] and np.allclose(heights, [0, 30, 20])
    circle = drawn.find(".//circle")
    assert (float(circle.get("cx")), float(circle.get("cy"))) == points[1] and drawn.get("aria-label") == '"a" < b'


def test_few_labels_say_mean_and_interval():
    rows = [
        (MODEL, k, d, rule, 0.1 * k + 0.02 * d, d > 0) for k in (1, 4) for d in range(3) for rule in ("chosen", "fixed")
    ]
    table = pd.DataFrame(rows, columns=["control", "k", "draw", "layer_rule", "test_accuracy", "converged"])
    table = table.assign(overlap=table.k.map({1: 0.0, 4: 0.6}), low_all=0.1 * table.k, high_all=0.1 * table.k + 0.05)
    _, _, facts = shown(FewLabelResult(table, {}, []))
    assert facts == {
        "1 labels a class": "12.0% [10.0%, 15.0%]", "4 labels a class": "42.0% [40.0%, 45.0%]",
        "over": "3 draws and all test images together: mean [95% interval]",
        "two draws share": "60% of their rows at k = 4", "not converged": "4 of 12 probes",
    }  # fmt: skip
    one = table[table.draw == 0].assign(overlap=0.0, low_all=np.nan, high_all=np.nan)
    _, _, facts = shown(FewLabelResult(one, {}, []))
    assert facts == {"1 labels a class": "10.0%", "4 labels a class": "40.0%", "over": "one draw",
                     "not converged": "4 of 4 probes"}  # fmt: skip


def test_a_store_says_what_is_in_it_and_whether_it_is_whole(tiny, train, test, tmp_path):
    store = lab.extract(tiny, [train, test], store=tmp_path, progress=False)
    text, page, facts = shown(store)
    assert f"FeatureStore {digest(store.key)[:8]}" in page and store.path.name.endswith(digest(store.key)[:8])
    assert facts["images"] == "shades: 60 train, 40 test" and facts["layers"] == "ln_1 0..3"
    assert facts["complete"] == "yes" and facts["model"].startswith("tiny, weights ") and text == repr(store)
    assert facts["size"] == f"{store.size / 1e6:,.1f} MB in 2 parts"
    assert "new" not in facts
    other = shown(lab.extract(tiny, [train, test], store=tmp_path, pool="max", progress=False))[2]
    assert other["new"] == f'pool is "max", there "mean" in {store.path.name}'
    part = FeatureStore(store.path, store.manifest | {"splits": store.manifest["splits"] | {"test": [None]}})
    assert shown(part)[2]["complete"] == "no: 1 of 2 parts; extract again to continue"


def test_an_image_set_shows_its_first_images(test):
    text, _, facts = shown(test)
    assert text == repr(test) and facts == {"images": "40", "classes": "2, each of 20 images: dark, light"}
    strip = np.asarray(Image.open(io.BytesIO(b64decode(re.search(r"base64,([^\"]+)", test._repr_html_())[1]))))
    assert strip.shape == (4, 12 * 5 - 1, 3)
    np.testing.assert_array_equal(strip[:, 10:14], np.asarray(test[2]))
    assert "img" not in test.select([])._repr_html_()
    tokens = TokenSet("some", "train", np.arange(3), None, (), np.zeros((3, 16), int))
    assert shown(tokens)[2] == {"images": "3", "classes": "no labels", "tokens": "16 an image"}


def test_a_model_says_its_sizes(tiny):
    text, page, _ = shown(tiny)
    assert text == (
        "<ImageGPTForCausalImageModeling tiny: 3 blocks of width 8, 2 heads, layers 0..3; 16 positions, 8 colours; "
        f"{sum(p.numel() for p in tiny.parameters()):,} parameters, float32 on cpu; with its palette>"
    )
    assert "16 positions, 8 colours" in page
    tiny.processor, tiny.name = None, "<b>&"
    assert "&lt;b&gt;&amp;" in tiny._repr_mimebundle_()["text/html"] and "without a palette" in shown(tiny)[0]


def test_a_card_escapes_what_it_is_given():
    page = card("<i>", {"a&b": "<script>", "absent": None})
    assert "<script>" not in page and "&lt;script&gt;" in page and "a&amp;b" in page and "absent" not in page
    assert "&lt;i&gt;" in page and card("t", {}).count("table") == 0


def test_layers_in_words():
    assert span([0, 1, 2, 3, 7]) == "0..3, 7" and span([1, 2]) == "1, 2" and span([]) == "" and span([5]) == "5"
