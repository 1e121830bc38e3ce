"""States as paths and clouds against laws; scores of a model against their parts; regret by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

import igpt_lab as lab
from igpt_lab.app import cli
from igpt_lab.app.commands.unlabelled import _drawn
from igpt_lab.explaining.scores import RULES, SCORES, regret, score_layers
from igpt_lab.explaining.trajectories import MEASURES, curvature, entropy_of_images, measure_states
from igpt_lab.models.losses import align
from igpt_lab.probing.entropies import dime, info_nce, lidar, matrix_entropy
from igpt_lab.probing.probes import probe_layers
from igpt_lab.probing.results import ProbeResult

TOKENS = np.random.default_rng(0).integers(0, 8, (6, 16))
QUIET = {"progress": False}


def path(*steps) -> torch.Tensor:
    """One image of 16 states: these steps again and again, from a place away from zero."""
    steps = torch.tensor(steps, dtype=torch.float64)[torch.arange(15) % len(steps)]
    return (torch.cat([torch.ones(1, steps.shape[1]), 1 + steps.cumsum(0)]) * 3)[None]


def test_a_straight_line_has_no_curvature_and_a_staircase_a_right_angle():
    for steps, angle in (([[1, 2, 0]], 0), ([[1, 0], [0, 2]], np.pi / 2), ([[1, 0], [-1, 0]], np.pi)):
        for measured in curvature(path(*steps), 4):
            assert measured.item() == pytest.approx(angle, abs=1e-7)


def test_turns_where_a_row_ends_are_counted_apart():
    """Pixels of a 4 x 4 image, at their places: straight inside rows, back to the left at their ends."""
    y, x = np.divmod(np.arange(16), 4)
    states = torch.as_tensor(np.stack([x, y], 1).astype(float))[None]
    inside, ends = curvature(states, 4)
    turn = np.pi - np.arctan2(1, 3)  # from (1, 0) to (-3, 1), and from there to (1, 0)
    assert inside.item() == pytest.approx(0, abs=1e-7) and ends.item() == pytest.approx(turn)


def test_a_step_that_goes_nowhere_has_no_angle():
    states = path([1.0, 0])
    states[0, 5:] = states[0, 4]
    inside, ends = curvature(states, 4)
    assert inside.item() == pytest.approx(0, abs=1e-7) and ends.item() == pytest.approx(0, abs=1e-7)
    assert curvature(0 * states, 4)[0].isnan().all()


@pytest.mark.parametrize("shape", [(5, 9, 30), (5, 30, 9)])
def test_the_entropy_of_an_image_is_that_of_its_states(shape):
    states = np.random.default_rng(0).normal(size=shape)
    expected = [matrix_entropy(image) for image in states]
    np.testing.assert_allclose(entropy_of_images(torch.as_tensor(states)), expected)


@torch.no_grad()
def test_the_states_are_those_of_the_model_without_the_first(tiny):
    measured = measure_states(tiny, TOKENS, layers=[1, 3], batch_size=4, **QUIET)
    assert list(measured.table) == ["layer", "measure", "value", "low", "high", "n"]
    assert measured.table.measure.tolist() == 2 * list(MEASURES) and set(measured.table.n) == {6}
    states = tiny(align(torch.as_tensor(TOKENS), "sos", tiny.config), output_hidden_states=True).hidden_states
    for layer, norm in ((1, tiny.transformer.h[1].ln_1), (3, None)):
        x = states[layer] if norm is None else norm(states[layer])
        x = x[:, 1:].double()
        expected = [entropy_of_images(x), *curvature(x, 4)]
        for name, values in zip(MEASURES, expected, strict=True):
            np.testing.assert_allclose(measured.of_images[layer, name], values, rtol=1e-4)
    row = measured.table.iloc[0]
    assert row.value == pytest.approx(measured.of_images[1, "image_entropy"].mean()) and row.low < row.value < row.high


def test_states_of_a_bidirectional_model_have_all_pixels(tiny):
    from dataclasses import replace

    model = type(tiny)(replace(tiny.config, bidirectional=True)).eval()
    assert set(measure_states(model, TOKENS, layers=[0], **QUIET).table.n) == {6}
    with pytest.raises(ValueError, match=r"tokens \(6, 15\); expected those of whole square images"):
        measure_states(tiny, TOKENS[:, :15], **QUIET)
    with pytest.raises(RuntimeError, match="training mode"):
        measure_states(tiny.train(), TOKENS, **QUIET)


def test_scores_are_those_of_their_parts(tiny, train, tmp_path):
    table = score_layers(tiny, train, store=tmp_path, of_states=10, seed=3, **QUIET)
    assert table.layer.tolist() == [0, 1, 2, 3] and set(SCORES) <= set(table)
    assert set(table.n) == {60} and set(table.n_states) == {10}
    viewed = lab.second_view(train, seed=3)
    stores = [lab.extract(tiny, images, store=tmp_path, **QUIET) for images in (train, viewed)]
    tokens = [lab.tokenize(images, tiny.processor) for images in (train, viewed)]
    assert table.tokens_changed[0] == (tokens[0] != tokens[1]).mean() > 0.2
    states = measure_states(tiny, tokens[0][:10], **QUIET).table.set_index(["layer", "measure"])
    for row in table.itertuples():
        first, second = (store.layer("ln_1", row.layer, "train") for store in stores)
        assert row.matrix_entropy == matrix_entropy(first) and row.info_nce == info_nce(first, second)
        assert row.lidar == lidar(first, second) and row.dime == dime(first, second, seed=3)
        assert row.effective_rank == lab.effective_rank(first)
        assert row.curvature == states.value[row.layer, "curvature"]
        assert row.image_entropy_high == states.high[row.layer, "image_entropy"]
    with pytest.raises(ValueError, match="is changed already"):
        score_layers(tiny, viewed, store=tmp_path, **QUIET)


def result_by_hand(chosen: int, *right: str) -> ProbeResult:
    correct = {layer: np.array(list(row)) == "1" for layer, row in enumerate(right)}
    return ProbeResult(pd.DataFrame({"layer": list(correct), "control": "model"}), correct, chosen)


def test_regret_by_hand():
    result = result_by_hand(1, "1" * 20 + "0" * 20, "1" * 30 + "0" * 10, "0" * 5 + "1" * 25 + "0" * 10, "0" * 40)
    scores = pd.DataFrame({"layer": [3, 2, 1, 0], "lidar": [1.0, 5, 4, 2], "curvature": [0.5, 2, 0.1, 0.3]})
    table = regret(scores, result).set_index("score")
    assert table.picked_layer.to_dict() == {"curvature": 1, "lidar": 2, "middle layer": 2, "last layer": 3}
    assert table.better.to_dict() == {"curvature": "lowest", "lidar": "highest", "middle layer": "", "last layer": ""}
    assert table.regret.tolist() == pytest.approx([0, 5 / 40, 5 / 40, 30 / 40])
    assert (table.regret_low["curvature"], table.regret_high["curvature"], table.p_value["curvature"]) == (0, 0, 1)
    paired = lab.compare(result.correct[1], result.correct[2])
    assert (table.regret_low["lidar"], table.regret_high["lidar"]) == (paired.low, paired.high)
    assert table.p_value["lidar"] == pytest.approx(2 * 0.5**5)  # five images that one alone gets right
    assert set(table.chosen_layer) == {1} and set(table.chosen_accuracy) == {0.75} and set(table.n_test) == {40}
    assert table.test_accuracy["last layer"] == 0 and list(table.index[-2:]) == list(RULES)


def test_equal_scores_pick_the_middle():
    result = result_by_hand(0, "11", "10", "01", "00", "11")
    scores = pd.DataFrame({"layer": range(5), "dime": [1.0, 2, 2, 2, 1]})
    assert regret(scores, result).picked_layer[0] == 2


def test_layers_with_names_have_their_middle_and_last_by_depth():
    numbered = result_by_hand(0, "11", "10", "01")
    names = ["stem", "block 10", "block 9"]  # by the alphabet the middle one is the last, and the first the last
    named = ProbeResult(numbered.table, dict(zip(names, numbered.correct.values(), strict=True)), "stem")
    scores = pd.DataFrame({"layer": names, "dime": [1.0, 3, 2]}).iloc[[2, 0, 1]]
    assert regret(scores, named).picked_layer.tolist() == ["block 10", "block 10", "block 9"]


def test_scores_that_do_not_fit():
    result = result_by_hand(0, "11", "10")
    with pytest.raises(ValueError, match=r"expected a row for each of the layers \[0, 1\]"):
        regret(pd.DataFrame({"layer": [0, 1, 2], "lidar": 1.0}), result)
    with pytest.raises(ValueError, match="one or more of effective_rank"):
        regret(pd.DataFrame({"layer": [0, 1], "x": 1.0}), result)
    with pytest.raises(ValueError, match="lidar is not finite at layer 1"):
        regret(pd.DataFrame({"layer": [0, 1], "lidar": [1.0, np.nan]}), result)


def test_the_command_writes_scores_and_with_labels_regret(tiny_folder, tiny_images, tmp_path, capsys):
    options = ["--store", str(tmp_path / "stores"), "--out", str(tmp_path)]
    assert cli.main(["scores", str(tiny_folder), str(tiny_images), "--scored", "40", "--name", "s", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("effective_rank (highest): layer ") and "points [" in printed[0]
    scores, lost = pd.read_csv(tmp_path / "s.csv"), pd.read_csv(tmp_path / "s_regret.csv")
    assert set(scores.n) == {40} and set(lost.n_scored) == {40} and lost.score.tolist() == [*SCORES, *RULES]
    features = [
        lab.Features.from_store(lab.extract(str(tiny_folder), images, store=tmp_path / "stores", **QUIET), images.split)
        for images in (lab.load_images(tiny_images, split) for split in ("train", "test"))
    ]
    expected = regret(scores, probe_layers(*features, **QUIET))
    np.testing.assert_allclose(lost.regret, expected.regret)
    assert set(lost.model) == {"tiny"} and set(lost.images) == {"shades"}


def test_the_command_loads_training_images_once(tiny_folder, tiny_images, tmp_path, monkeypatch, capsys):
    asked, load = [], lab.load_images
    few, whole = load(tiny_images, "train", limit=40), load(tiny_images, "train")

    def counted(source, *rest, **keywords):
        asked.append((source, *rest))
        return load(source, *rest, **keywords)

    monkeypatch.setattr(lab, "load_images", counted)
    options = ["--store", str(tmp_path / "stores"), "--out", str(tmp_path)]
    assert cli.main(["scores", str(tiny_folder), str(tiny_images), "--scored", "40", *options]) == 0
    assert [one for one in asked if isinstance(one[0], str)] == [
        (str(tiny_images), split) for split in ("train", "test")
    ]
    drawn = _drawn(whole, 40)
    assert drawn.index.tolist() == few.index.tolist() and drawn.source == few.source
    assert drawn.fingerprint == few.fingerprint
