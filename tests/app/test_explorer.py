"""What the explorer sends to the browser, compared with other ways to the same numbers."""

import base64
import gc
import json
import os
import re
import shutil
import subprocess
import tomllib
import tracemalloc
import weakref
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ipywidgets import Widget
from ipywidgets.widgets import widget
from PIL import Image
from scipy.stats import binomtest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import igpt_lab as lab
from igpt_lab.app.explorer import layers as explorer_layers
from igpt_lab.app.explorer import opened, rows
from igpt_lab.app.explorer import widget as module
from igpt_lab.app.explorer.layers import changes, survey
from igpt_lab.app.explorer.opening import explore
from igpt_lab.app.explorer.rows import HELD
from igpt_lab.app.explorer.views import folder_name
from igpt_lab.core.chosen import about_choice
from igpt_lab.features.manifest import FeatureKey
from igpt_lab.features.upkeep import list_stores

CELL = "from igpt_lab.app.explorer.opened import cell_at_hand; print(cell_at_hand())"
SCRIPTS = [*Path(module.__file__).parent.glob("panels/*.js"), Path(module.__file__).with_name("explorer.js")]


@pytest.fixture(scope="module")
def images(tiny_images, tmp_path_factory) -> Path:
    """A copy of its own, which a test may take away."""
    return Path(shutil.copytree(tiny_images, tmp_path_factory.mktemp("copy") / "shades"))


@pytest.fixture(scope="module")
def store(tiny_folder, images, tmp_path_factory):
    sets = [lab.load_images(images, split) for split in ("train", "test")]
    model = lab.load_model(tiny_folder)
    return lab.extract(model, sets, store=tmp_path_factory.mktemp("s"), points=["ln_1", "mlp_out"], progress=False)


@pytest.fixture(autouse=True)
def closed(store):
    """No explorer outlives its test: those of one store share what they computed, and what is kept beside it."""
    yield
    Widget.close_all()
    for file in kept_beside(store):
        file.unlink()


@pytest.fixture
def seen(store, tmp_path):
    return opened_by_browser(store, out=tmp_path)


def opened_by_browser(store, **options):
    """An explorer as a browser leaves it, which asks for the probes once it shows the pictures."""
    explorer = explore(store, progress=False, **options)
    explorer._handle_custom_msg({"do": "fit"}, [])
    return explorer


def kept_beside(store) -> list[Path]:
    return sorted(store.path.parent.glob(".*.answers.json"))


def sent(explorer, name, kind):
    return np.frombuffer(getattr(explorer, name), kind)


def test_places_are_principal_components_turned_to_follow(store):
    layers = {layer: store.layer("ln_1", layer, "test") for layer in store.layers["ln_1"]}
    places, explained, near = survey(layers)
    for i, x in enumerate(layers.values()):
        x = StandardScaler().fit_transform(x.astype(np.float64))
        own = PCA(2).fit(x)
        theirs = own.transform(x)
        theirs /= np.sqrt((theirs**2).sum(1).mean())
        ours, unturned = (np.linalg.norm(xy[:, None] - xy, axis=-1) for xy in (places[i], theirs))
        np.testing.assert_allclose(ours, unturned, atol=1e-3)  # a turn or a mirror moves no point nearer to another
        assert explained[i].sum() == pytest.approx(own.explained_variance_ratio_.sum(), abs=1e-4)
        if i:
            assert ((places[i] - places[i - 1]) ** 2).sum() <= ((theirs - places[i - 1]) ** 2).sum() + 1e-3
        expected, _ = NearestNeighbors(n_neighbors=9).fit(x).kneighbors(x)
        distances = np.linalg.norm(x[near[i]] - x[:, None], axis=-1)
        np.testing.assert_allclose(distances, expected[:, 1:], atol=1e-3)  # equals may come in any order


def test_predictions_are_those_of_the_probes(seen, store):
    result = lab.probe_layers(*(lab.Features.from_store(store, split) for split in ("train", "test")), progress=False)
    predicted = sent(seen, "predicted", "<u2").reshape(4, 40)
    labels = store.labels("test")
    np.testing.assert_array_equal(sent(seen, "labels", "<u2"), labels)
    np.testing.assert_array_equal(sent(seen, "rows", "<i4"), store.index("test"))
    for row, predictions in zip(result.table.itertuples(), predicted, strict=True):
        assert (predictions == labels).mean() == row.test_accuracy
    assert [row["accuracy"] for row in seen.facts["curve"]] == result.table.test_accuracy.tolist()
    assert seen.facts["chosen"] == result.chosen == seen.layer and seen.other == 3


def test_it_opens_before_its_probes_are_fitted(store, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "probe_layers", lambda *_, **__: 1 / 0)
    seen = explore(store, out=tmp_path, progress=False)
    assert seen.pictures and seen.near and seen.predicted == b"" and seen.facts["curve"] == [] and seen.layer == 2
    assert repr(seen) == "<Explorer tiny on shades: 40 test images, point ln_1; probes not fitted yet>"
    assert "data:image/png" in seen._repr_mimebundle_()[0]["text/html"] and not kept_beside(store)
    seen._handle_custom_msg({"do": "fit"}, [])
    assert "The probes are not fitted: division by zero" in seen.problem
    monkeypatch.undo()
    seen.layer = 0
    seen._handle_custom_msg({"do": "fit"}, [])
    assert seen.problem == "" and len(seen.facts["curve"]) == 4 and seen.layer == 0  # it has been moved


def test_answers_are_kept_beside_the_store(seen, store, tmp_path, monkeypatch):
    before, predicted = seen.facts, seen.predicted
    seen.split = HELD
    of_held = seen.facts
    assert len(kept_beside(store)) == 2 and len(list_stores(store.path.parent)) == 1
    seen.close()
    monkeypatch.setattr(rows, "probe_layers", lambda *_, **__: 1 / 0)
    again = explore(store.path, out=tmp_path, progress=False)
    assert again.facts == before and again.predicted == predicted and again.layer == before["chosen"]
    again.split = HELD
    assert again.facts == of_held
    again.close()
    for file in kept_beside(store):  # a file that somebody has changed is no answer
        content = json.loads(file.read_text())
        content["predicted"][0][0] = 1 - content["predicted"][0][0]
        file.write_text(json.dumps(content))
    assert explore(store, out=tmp_path, progress=False).facts["curve"] == []


def test_kept_answers_of_a_stranger_are_passed_over(seen, store, tmp_path):
    (file,) = kept_beside(store)
    seen.close()
    whole = json.loads(file.read_text())
    layer, wrong = np.argwhere(np.array(whole["predicted"]) != store.labels("test"))[0]
    odd = [
        *(lambda it, to=to: it["predicted"][layer].__setitem__(wrong, to) for to in (9, -1, 10**30, 0.5)),
        lambda it: it.update(chosen=True), lambda it: it.update(chosen=2.0), lambda it: it.update(chosen=9),
        lambda it: it["table"].update(low=[np.nan] * 4), lambda it: it["table"].update(low=[0.99] * 4, high=[5.0] * 4),
        lambda it: it["table"].update(low=[10**400] * 4), lambda it: it["table"].update(high=it["table"]["low"]),
        lambda it: it["table"].update(converged=[3, 1, 0, 1]), lambda it: it["table"].update(in_peak_set=[7, 8, 9, 1]),
        lambda it: it["table"].update(n_validation=[1e300] * 4), lambda it: it["table"].update({"<b>": [1, 2, 3, 4]}),
        lambda it: it["table"].update(validation_accuracy=[5.0] * 4), lambda it: it["table"].pop("high"),
    ]  # fmt: skip
    for change in odd:
        content = json.loads(json.dumps(whole))
        change(content)
        file.write_text(json.dumps(content))
        with closing(explore(store, out=tmp_path, progress=False)) as again:
            assert again.facts["curve"] == []
    for text in ("[" * 100_000, "[]", ""):
        file.write_text(text)
        explore(store, out=tmp_path, progress=False).close()
    file.write_text(json.dumps(whole))
    assert explore(store, out=tmp_path, progress=False).facts["curve"]


@pytest.mark.skipif(os.name != "posix", reason="pipes are files")
def test_kept_answers_that_are_a_pipe_or_large_are_not_read(seen, store, tmp_path):
    (file,) = kept_beside(store)
    seen.close()
    with file.open("r+b") as held:
        held.truncate(10**9)  # a hole in a file takes no disk
    tracemalloc.start()
    explore(store, out=tmp_path, progress=False).close()
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    file.unlink()
    os.mkfifo(file)
    assert explore(store, out=tmp_path, progress=False).facts["curve"] == []  # and no wait for a writer


def test_a_result_of_other_features_is_refused(store, tmp_path):
    splits = {split: lab.Features.from_store(store, split) for split in ("train", "test")}
    result = lab.probe_layers(splits["train"], splits["test"], progress=False)
    explore(splits, out=tmp_path, result=result, progress=False).close()
    moved = splits | {"test": replace(splits["test"], layers={layer: -x for layer, x in splits["test"].layers.items()})}
    with pytest.raises(ValueError, match="the result is of other features, such as those of another model"):
        explore(moved, out=tmp_path, result=result, progress=False)
    permuted = lab.probe_layers(splits["train"], splits["test"], permute_labels=True, progress=False)
    with pytest.raises(ValueError, match="of other features"):
        explore(store, out=tmp_path, result=permuted, progress=False)
    with pytest.raises(ValueError, match="no split but train"):
        explore({"train": splits["test"]}, result=result, progress=False)


@pytest.mark.parametrize("limit", [None, 11])
def test_a_result_answers_in_place_of_a_fit(store, tmp_path, monkeypatch, limit):
    train, test = (lab.Features.from_store(store, split) for split in ("train", "test"))
    result = lab.probe_layers(train, test, progress=False)
    other = lab.probe_layers(test, train, progress=False)
    monkeypatch.setattr(rows, "probe_layers", lambda *_, **__: 1 / 0)
    seen = explore(store, out=tmp_path, result=result, limit=limit, progress=False)
    at = np.isin(store.index("test"), sent(seen, "rows", "<i4"))
    assert at.sum() == (limit or 40) and seen.layer == result.chosen
    for layer, row in enumerate(seen.facts["curve"]):
        correct = result.correct[layer][at]
        interval = binomtest(int(correct.sum()), len(correct)).proportion_ci()
        assert (row["accuracy"], row["low"], row["high"]) == pytest.approx((correct.mean(), *interval), abs=1e-9)
    with pytest.raises(ValueError, match="the result is of other images: expected 40"):
        explore(store, result=other, progress=False)


def test_the_held_out_tenth_is_met_by_probes_of_the_other_rows(seen, store):
    train, test = (lab.Features.from_store(store, split) for split in ("train", "test"))
    result = lab.probe_layers(train, test, progress=False)
    seen.split = HELD
    held = np.isin(train.index, sent(seen, "rows", "<i4"))
    theirs = []
    for layer, C in zip(result.table.layer, result.table.C, strict=True):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
        fitted.fit(train.layers[layer][~held], train.labels[~held])
        theirs.append(fitted.score(train.layers[layer][held], train.labels[held]))
    accuracies = [row["accuracy"] for row in seen.facts["curve"]]
    one_row = 1 / 6 + 1e-9  # of 6, one may differ
    np.testing.assert_allclose(accuracies, theirs, atol=one_row)
    assert seen.facts["doubts"] == about_choice(result.table)  # also here: all of train chose
    assert seen.facts["n"] == 6 and seen.facts["chosen"] == result.chosen and "held out" in seen.facts["of"]
    assert set(sent(seen, "rows", "<i4")) <= set(store.index("train"))


def test_a_poor_choice_is_told_in_the_panel_the_page_and_the_text(seen, store):
    table = seen.answers.table
    assert table.n_validation.tolist() == [60] * 4 and seen.facts["doubts"] == about_choice(table)
    unsure = table.assign(validation_accuracy=[0.8, 0.8, 0.7, 0.8])
    seen._computed["answers", "ln_1", "test", 0, 4000] = replace(seen.answers, table=unsure)
    assert "; within one standard error: 0, 1, 3; a poor choice: 3 of 4 layers" in seen.describe()
    assert "A poor choice: 3 of 4 layers" in seen._repr_mimebundle_()[0]["text/html"]


def test_few_labels_are_those_of_the_few_label_probe(seen, store):
    assert seen.facts["choices"]["count"] == [0, 1, 4, 25]
    seen.count = 4
    features = [lab.Features.from_store(store, split) for split in ("train", "test")]
    theirs = lab.probe_few_labels(*features, ks=[4], draws=1, layers=range(4), progress=False).table
    fixed = theirs[theirs.layer_rule == "fixed"]
    assert [row["accuracy"] for row in seen.facts["curve"]] == fixed.test_accuracy.tolist()
    assert seen.facts["chosen"] == theirs[theirs.layer_rule == "chosen"].layer.item() and seen.facts["n_train"] == 8


def test_pictures_are_what_the_network_gets_and_neighbours_in_pixels_are_theirs(seen, images, tiny_folder):
    test = lab.load_images(images, "test")
    pixels = lab.load_model(tiny_folder).processor.resize(test.images())[..., :1]
    assert seen.pictures == pixels.tobytes() and seen.facts["shape"] == [4, 4, 1]
    flat = pixels.reshape(40, -1).astype(float)
    near = sent(seen, "pixel_near", "<i4").reshape(40, 8)
    theirs = NearestNeighbors(n_neighbors=9).fit(flat).kneighbors(flat)[0][:, 1:]
    np.testing.assert_allclose(np.linalg.norm(flat[near] - flat[:, None], axis=-1), theirs, atol=1e-3)
    assert seen.facts["classes"] == ["dark", "light"]


def test_changes_by_hand():
    labels, a, b = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 0, 0, 2]), np.array([0, 0, 0, 2, 0, 2])
    assert {name: list(group) for name, group in changes(labels, a, b).items()} == {
        "only this layer is right": [2], "only the other is right": [1], "both wrong, differently": [3],
    }  # fmt: skip


def test_another_point_keeps_what_is_looked_at(seen):
    seen.layer, seen.image, before = 2, 7, seen.near
    seen.point = "mlp_out"
    assert seen.facts["at"]["point"] == "mlp_out" and seen.facts["layers"] == [0, 1, 2]
    assert seen.layer == 2 and seen.other == 2 and seen.image == 7 and seen.near != before
    seen.point = "ln_1"
    assert seen.near == before and not seen.busy


def test_what_cannot_be_chosen_changes_nothing(seen):
    before = seen.facts
    with pytest.raises(ValueError, match="split 'tests'; expected one of test, held out"):
        seen.split = "tests"
    assert seen.split == "test" and seen.facts == before
    with pytest.raises(ValueError, match="count 3; expected one of 0, 1, 4, 25"):
        seen.count = 3


def test_a_failure_is_told_and_what_was_shown_stays(seen, monkeypatch):
    before = seen.facts

    def fail(*_, **__):
        raise ValueError("class 0 has 3 rows; 4 per class were asked for")

    monkeypatch.setattr(explorer_layers, "probe_few_labels", fail)
    seen.count = 4
    assert seen.problem.startswith("class 0 has 3 rows") and seen.count == 0 and seen.facts == before and not seen.busy


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_or_another_error_leaves_the_choice_that_is_shown(seen, monkeypatch, error):
    before = seen.facts, seen.predicted

    def stopped(*_, **__):
        raise error

    monkeypatch.setattr(explorer_layers, "probe_few_labels", stopped)
    with pytest.raises(error):
        seen.count = 4
    assert seen.count == 0 and (seen.facts, seen.predicted) == before and not seen.busy


def test_a_limit_is_a_draw_of_that_many(store, tmp_path):
    some = explore(store, out=tmp_path, limit=11, progress=False)
    drawn = sent(some, "rows", "<i4")
    assert len(drawn) == 11 and (np.diff(drawn) > 0).all() and some.facts["of"] == "11 of 40 test images"
    expected = store.labels("test")[np.isin(store.index("test"), drawn)]
    np.testing.assert_array_equal(sent(some, "labels", "<u2"), expected)


def test_save_writes_the_view_as_figures_twice_the_same(seen, store, tmp_path):
    seen.layer, seen.other, seen.image = 1, 3, 5
    files = seen.save()
    folder = tmp_path / store.path.name / "ln_1-test-all-labels-layer01-other03-row5"
    assert {file.parent for file in files} == {folder.resolve()}
    names = {"accuracy", "confusion", "features", "neighbours", "changes"}
    assert {file.stem for file in files} >= names - {"changes"} and len(files) % 5 == 0
    content = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in seen.save()] == content
    confusion = pd.read_csv(folder / "confusion.csv", index_col="true")
    predicted = sent(seen, "predicted", "<u2").reshape(4, 40)[1]
    right = np.trace(confusion.to_numpy())
    assert confusion.to_numpy().sum() == 40 and right == (predicted == store.labels("test")).sum()
    view = json.loads((folder / "features.json").read_text())["config"]["view"]
    assert view == {
        "point": "ln_1", "split": "test", "count": 0, "layer": 1, "other": 3, "image": 5,
        "alone": {}, "row": 5, "chosen": seen.facts["chosen"],
    }  # fmt: skip


def test_what_is_seen_alone_is_saved_alone(seen, store):
    labels, predicted = store.labels("test"), seen.answers.predicted[seen.layer]
    seen.alone = {"label": 1}
    (file,) = (file for file in seen.save() if file.name == "features.csv")
    assert file.parent.name.endswith("-row0-label-light")
    assert pd.read_csv(file).row.tolist() == store.index("test")[labels == 1].tolist()
    for guess in (0, 1):
        seen.alone = {"label": 1, "predicted": guess}
        rows_of = [pd.read_csv(file).row.tolist() for file in seen.save() if file.name == "features.csv"]
        alone = store.index("test")[(labels == 1) & (predicted == guess)].tolist()
        assert rows_of == ([alone] if alone else [])  # no map of no images
    seen.point = "mlp_out"
    assert seen.alone == {}


def test_a_view_goes_to_the_results_of_the_run(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(store.path, tmp_path / "mine/stores" / store.path.name)
    shutil.copytree(store.path, tmp_path / "elsewhere" / store.path.name)
    of_run = opened_by_browser(tmp_path / "mine/stores" / store.path.name).export()
    assert of_run.relative_to(tmp_path / "mine/explorer").parts[0] == store.path.name
    assert opened_by_browser(Path("elsewhere", store.path.name)).export().is_relative_to(tmp_path / "explorer")


def test_the_page_holds_what_was_sent_and_nothing_that_ends_its_script(seen, tmp_path):
    seen.facts = seen.facts | {"title": "</script><b>"}
    told = []
    seen.send = told.append
    seen._handle_custom_msg({"do": "export"}, [])
    text = Path(told[0]["saved"], "explorer.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<title>&lt;/script&gt;&lt;b&gt;</title>" in text
    assert "default-src 'none'" in text
    packed = json.loads(re.search(r'id="sent">(.*?)</script>', text, re.DOTALL)[1])
    assert packed["values"]["facts"] == json.loads(json.dumps(seen.facts)) and packed["values"]["layer"] == seen.layer
    for name, data in packed["arrays"].items():
        assert base64.b64decode(data) == getattr(seen, name) != b""


def test_an_original_is_its_file_and_the_tokens_are_those_of_the_model(seen, images, tiny_folder):
    told = []
    seen.send = lambda content, buffers: told.append((content["original"], buffers))
    seen._handle_custom_msg({"do": "original", "image": 3}, [])
    facts, (original, read) = told[0]
    assert facts == {"image": 3, "split": "test", "size": [4, 4], "shapes": [[4, 4, 3], [4, 4, 3]]}
    with Image.open(images / "test/dark/003.png") as image:
        assert original == np.asarray(image.convert("RGB")).tobytes()
    test = lab.load_images(images, "test")
    model = lab.load_model(tiny_folder)
    tokens = lab.tokenize(test[3:4], model.processor, progress=False)
    colours = np.round((model.processor.clusters[tokens[0]] + 1) * 127.5)
    np.testing.assert_allclose(np.frombuffer(read, np.uint8).reshape(16, 3), colours, atol=1)
    for image in (40, -1, "x", None):
        seen._handle_custom_msg({"do": "original", "image": image}, [])
        assert told[-1] == ({"image": image, "split": "test", "size": [], "shapes": []}, [])


def test_the_choice_is_told_where_it_is_shown(seen):
    assert seen.facts["choice"] == "on validation"
    seen.split = HELD
    assert "these among them, so that this accuracy is no test" in seen.facts["choice"]


@settings(deadline=None)
@given(st.text(min_size=1))
@example("..")
@example(".")
@example("/etc/passwd")
@example("a\\..\\b")
def test_a_name_from_a_store_is_one_folder_inside_that_of_the_explorer(name):
    assert Path("out", folder_name(name)).parts == ("out", folder_name(name))
    assert not set(folder_name(name)) & {"/", "\\", "\0", ":"} and folder_name(name) not in (".", "..")
    assert folder_name(name) == name or "%" in folder_name(name)


def test_the_save_button(seen):
    told = []
    seen.send = told.append
    seen._handle_custom_msg({"do": "save"}, [])
    assert Path(told[0]["saved"], "accuracy.png").is_file() and "accuracy.png" in told[0]["files"]


def test_without_widgets_there_is_a_page(seen):
    data, _ = seen._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"].startswith("<Explorer tiny on shades: 40 test images, point ln_1, layers 0..3; layer ")
    page = data["text/html"]
    assert "data:image/png;base64," in page and "not for choosing" in page and "<script" not in page
    assert page.count("<tr>") == 5 and f"{seen.facts['curve'][0]['accuracy']:.1%}" in page


def test_the_front_end_asks_no_network():
    text = module.front_end() + str(module.Explorer._css)
    assert set(re.findall(r"\w+://[^\"'`\s]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert not re.search(r"\bimport\b|fetch\(|XMLHttpRequest|url\(|innerHTML", text)


def test_the_front_end_is_all_of_its_files(seen):
    assert seen._esm == module.front_end() and len(SCRIPTS) > 9
    assert all(seen._esm.count(file.read_text(encoding="utf-8")) == 1 for file in SCRIPTS)
    defined = re.findall(r"^(?:function|class|const|let) (\w+)", seen._esm, re.MULTILINE)
    assert len(set(defined)) == len(defined)  # the files share one scope


def test_a_wheel_has_every_file_of_the_front_end():
    root = Path(lab.__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["igpt_lab"]
    packed = {file for pattern in patterns for file in (root / "igpt_lab").glob(pattern)}
    assert packed >= set(SCRIPTS)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here")
@pytest.mark.parametrize("name", ["front end", *(file.name for file in SCRIPTS)])
def test_each_file_of_the_front_end_parses(name):
    text = {file.name: file.read_text(encoding="utf-8") for file in SCRIPTS} | {"front end": module.front_end()}
    command = ["node", "--check", "--input-type=module"]
    done = subprocess.run(command, input=text[name], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_a_closed_explorer_is_gone_and_says_so_until_then(store, tmp_path):
    explorers = [opened_by_browser(store, out=tmp_path) for _ in range(10)]
    arrays = [weakref.ref(explorers[0].shown.layers[1]), weakref.ref(explorers[0].seen.pixels)]
    for one, other in pairwise(explorers):
        assert one.shown is other.shown and one.near is other.near and one.pictures is other.pictures
    alive = [weakref.ref(explorer) for explorer in explorers]
    explorers[3].point = "mlp_out"  # each has choices of its own
    assert explorers[2].point == "ln_1" and explorers[2].answers is explorers[4].answers
    for explorer in explorers:
        assert all(array() is not None for array in arrays)
        explorer.close()
    assert repr(explorer) == "<Explorer tiny on shades: closed>" and not explorer.pictures
    with pytest.raises(ValueError, match="this explorer is closed"):
        explorer.save()
    explorer._on_message(None, {"do": "look", "image": 0, "layer": 1, "pixel": 3}, [])  # asked before it was closed
    assert not [array for array in arrays if array() is not None]
    del explorers, explorer, one, other
    gc.collect()
    assert not [explorer for explorer in alive if explorer() is not None]


def test_ten_explorers_take_less_than_twice_the_memory_of_one(tmp_path):
    key = FeatureKey(
        "m", "w", "p", 4, "r", "c", "i", {"train": ("a", 400), "test": ("b", 400)}, {"ln_1": [0, 1, 2]}, "mean", "sos",
        "float32",
    )  # fmt: skip
    generator, names = np.random.default_rng(0), [f"ln_1.{layer}" for layer in range(3)]
    with closing(lab.StoreWriter.create(tmp_path, key, {"train": 1, "test": 1})) as writer:
        for split in ("train", "test"):
            labels, stats = np.arange(400) % 2, dict.fromkeys(names, [1.0, 0.0, 0])
            values = {name: generator.normal(size=(400, 500)).astype(np.float32) for name in names}
            writer.write_part(split, 0, np.arange(400), labels, values, stats)
    tracemalloc.start()
    try:
        explorers = [opened_by_browser(writer.path, out=tmp_path)]
        gc.collect()
        of_one = tracemalloc.get_traced_memory()[0]
        explorers += [opened_by_browser(writer.path, out=tmp_path) for _ in range(9)]
        gc.collect()
        of_ten = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert of_one > 2 * 3 * 400 * 500 * 4  # bytes of the features, at least
    assert of_ten < 2 * of_one and len({id(explorer) for explorer in explorers}) == 10


def test_an_explorer_that_cannot_begin_leaves_nothing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "survey", lambda layers: 1 / 0)
    before = len(widget._instances)
    with pytest.raises(ZeroDivisionError):
        explore(store, out=tmp_path, progress=False)
    assert len(widget._instances) == before


def test_a_cell_that_runs_again_replaces_the_explorers_of_its_earlier_run(store, tmp_path, monkeypatch):
    def run(cell, number):
        monkeypatch.setattr(opened, "cell_at_hand", lambda: (cell, number))
        return explore(store, out=tmp_path, progress=False)

    first, second, elsewhere = run("a", "1"), run("a", "1"), run("b", "2")
    nowhere = run("", ""), run("", "3")
    assert not any(explorer.is_closed for explorer in (first, second, elsewhere, *nowhere))  # two of one run may be
    again = run("a", "4")
    closed = [explorer.is_closed for explorer in (first, second, elsewhere, *nowhere, again)]
    assert closed == [True, True, False, False, False, False]
    assert again.shown is elsewhere.shown


def test_the_cell_at_hand_is_what_a_front_end_sends(tmp_path):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        sent = client.session.msg("execute_request", {"code": CELL, "silent": False}, metadata={"cellId": "c-1"})
        client.shell_channel.send(sent)
        outputs = iter(lambda: client.get_iopub_msg(timeout=60), None)
        text = next(output["content"]["text"] for output in outputs if output["msg_type"] == "stream")
        assert text == f"('c-1', '{sent['header']['msg_id']}')\n"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert opened.cell_at_hand() == ("", "")


def test_a_store_without_train_or_whose_images_are_gone(store, tiny_folder, images, tmp_path):
    only = lab.extract(tiny_folder, lab.load_images(images, "test"), store=tmp_path / "s", progress=False)
    with pytest.raises(ValueError, match="has the splits test; a probe needs one named train"):
        explore(only)
    away = images.rename(images.with_name("away"))
    try:
        blind = explore(store.path, out=tmp_path, progress=False)
        assert blind.pictures == b"" and "not where the store says" in blind.facts["no_pictures"]
        assert blind.facts["classes"] == ["dark", "light"] and len(blind.save()) == 15
    finally:
        away.rename(images)
