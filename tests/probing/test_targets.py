"""Ridge regressions against scikit-learn's, and R² against its definition."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from igpt_lab.app import cli
from igpt_lab.figures import target_curves
from igpt_lab.probing.features import Features
from igpt_lab.probing.targets import ALPHAS, fit_ridge, probe_targets, r2_with_interval
from tables import target_table

QUIET = {"progress": False}


def made_up(n: int, width: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, pd.DataFrame]:
    """Features of unequal scales far from zero, float32 (n, width), and three targets: of one, of all, of none."""
    generator, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    scales, weights = fixed.uniform(0.1, 20, width), fixed.normal(size=width)
    x = generator.normal(size=(n, width))
    targets = {"one": 5 * x[:, 0], "all": x @ weights, "none": np.zeros(n)}
    table = pd.DataFrame({name: 1000 + y + noise * generator.normal(size=n) for name, y in targets.items()})
    return (x * scales + 30).astype(np.float32), table


@pytest.mark.parametrize("shape", [(80, 6), (80, 200)], ids=["tall", "wide"])
def test_the_fits_are_those_of_ridge_cv(shape):
    (x, y), (x_test, _) = made_up(*shape, seed=0), made_up(*shape, seed=1)
    alphas = np.logspace(-2, 5, 15)
    scaler = StandardScaler().fit(x.astype(float))
    peer = RidgeCV(alphas, alpha_per_target=True, store_cv_results=True)
    peer.fit(scaler.transform(x.astype(float)), y.to_numpy())
    fit = fit_ridge(x, y.to_numpy(), alphas)
    np.testing.assert_allclose(fit.alphas, peer.alpha_)
    np.testing.assert_allclose(fit.weights.T * scaler.scale_, peer.coef_, rtol=1e-8, atol=1e-8)
    expected = peer.predict(scaler.transform(x_test.astype(float)))
    np.testing.assert_allclose(fit.predict(x_test), expected, rtol=1e-8)
    losses = peer.cv_results_.mean(0).min(-1)
    np.testing.assert_allclose(fit.validation_r2, 1 - losses / y.var(ddof=0), rtol=1e-8, atol=1e-8)


def test_leaving_out_is_leaving_out():
    x, y = made_up(20, 3, seed=0)
    x, targets = StandardScaler().fit_transform(x.astype(float)), y.to_numpy()
    fit = fit_ridge(x, targets, np.array([4.0]))
    errors = np.empty_like(targets)
    for i in range(20):
        rest = np.delete(np.arange(20), i)
        mean, middle = x[rest].mean(0), targets[rest].mean(0)
        z = x[rest] - mean
        weights = np.linalg.solve(z.T @ z + 4 * np.eye(3), z.T @ (targets[rest] - middle))
        errors[i] = targets[i] - middle - (x[i] - mean) @ weights
    np.testing.assert_allclose(1 - (errors**2).mean(0) / targets.var(0), fit.validation_r2)


def test_a_row_for_each_layer_and_target():
    (x, y), (x_test, y_test) = made_up(120, 6, seed=0), made_up(90, 6, seed=1)
    layers = [{0: values[:, 1:], 3: values, 4: values[:, :1]} for values in (x, x_test)]
    result = probe_targets(*layers, y, y_test, seed=3, control="c", **QUIET)
    assert result.table[["layer", "target"]].apply(tuple, axis=1).tolist() == [
        (layer, name) for layer in (0, 3, 4) for name in ("one", "all", "none")
    ]
    for row in result.table.itertuples():
        assert row.test_r2 == pytest.approx(r2_score(y_test[row.target], result.predicted[row.layer, row.target]))
        assert row.low < row.test_r2 < row.high and row.n_train == 120 and row.n_test == 90 and row.control == "c"
    assert result.chosen["one"] in (3, 4) and result.chosen["all"] == 3
    assert result.table.groupby("target").chosen.sum().eq(1).all()
    values = result.table.set_index(["layer", "target"])
    assert values.test_r2[3, "all"] > 0.6 > 0.3 > values.test_r2[3, "none"] and values.at_edge[3, "none"]
    assert values.n_features.loc[4, "all"] == 1 and "R² " in repr(result) and "120 train" in result._repr_html_()
    alone = probe_targets({3: x}, {3: x_test}, y["all"], y_test["all"], seed=3, **QUIET).table.iloc[0]
    assert alone[["alpha", "test_r2", "low", "high"]].to_list() == pytest.approx(
        values.loc[(3, "all"), ["alpha", "test_r2", "low", "high"]].to_list()
    )


def test_the_interval_covers_r2():
    """Of a known predictor: the share of variance that it leaves."""
    truth, covered = 1 - 1 / (1 + 4), []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        signal, noise = 2 * generator.normal(size=(150, 1)), generator.normal(size=(150, 1))
        _, low, high = r2_with_interval((noise**2)[None], signal + noise, seed=seed)
        covered.append(low[0, 0] < truth < high[0, 0])
    assert 0.89 < np.mean(covered) < 0.985


def test_what_can_be_a_target():
    (x, y), (x_test, y_test) = made_up(60, 4, seed=0), made_up(50, 4, seed=1)
    features = [Features({0: values}, np.zeros(len(values), int), np.arange(len(values))) for values in (x, x_test)]
    table = probe_targets(*features, y, y_test, **QUIET).table
    dicts = [{name: split[name].to_numpy() for name in split} for split in (y, y_test)]
    assert table.equals(probe_targets({0: x}, {0: x_test}, *dicts, **QUIET).table)
    arrays = probe_targets({0: x}, {0: x_test}, y.to_numpy(), y_test.to_numpy(), **QUIET).table
    assert arrays.target.tolist() == ["target 0", "target 1", "target 2"] and arrays.low.equals(table.low)
    assert probe_targets({0: x}, {0: x_test}, y.one.to_numpy(), y_test.one.to_numpy(), **QUIET).chosen == {"target": 0}


def test_bad_input():
    (x, y), (x_test, y_test) = made_up(60, 4, seed=0), made_up(50, 4, seed=1)
    layers = {0: x}, {0: x_test}
    with pytest.raises(ValueError, match=r"layers of train: \[0\], of test: \[1\]"):
        probe_targets({0: x}, {1: x_test}, y, y_test, **QUIET)
    with pytest.raises(ValueError, match=r"targets of train: \['one'.*of test: \['all'\]"):
        probe_targets(*layers, y, y_test[["all"]], **QUIET)
    with pytest.raises(ValueError, match="targets of train have 59 rows, layer 0 has 60 images there"):
        probe_targets(*layers, y[1:], y_test, **QUIET)
    with pytest.raises(ValueError, match="'one' of train has no finite number in 1 rows"):
        probe_targets(*layers, y.assign(one=y.one.where(y.index > 0)), y_test, **QUIET)
    with pytest.raises(ValueError, match="'name' of train has no finite number in 60 rows"):
        probe_targets(*layers, y.assign(name="x"), y_test.assign(name="x"), **QUIET)
    with pytest.raises(ValueError, match="'one' has one value in all 50 images of test"):
        probe_targets(*layers, y, y_test.assign(one=3), **QUIET)
    with pytest.raises(ValueError, match="alpha=0.0; expected numbers above 0"):
        probe_targets(*layers, y, y_test, alphas=[0.0, 1.0], **QUIET)
    with pytest.raises(ValueError, match="layer 0 has values that are not finite"):
        probe_targets({0: x * np.nan}, {0: x_test}, y, y_test, **QUIET)
    with pytest.raises(TypeError, match="layers of type ndarray"):
        probe_targets(x, x_test, y, y_test, **QUIET)
    with pytest.raises(ValueError, match="layer 0 has 4 features in train, 1 in test"):
        probe_targets({0: x}, {0: x_test[:, :1]}, y, y_test, **QUIET)
    with pytest.raises(ValueError, match=r"layer 0 has shape \(60, 0\)"):
        probe_targets({0: x[:, :0]}, {0: x_test[:, :0]}, y, y_test, **QUIET)
    assert len(ALPHAS) == 21


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (None, r"targets of train are a NoneType of shape \(\)"),
        (np.zeros((60, 2, 2)), r"targets of train are a ndarray of shape \(60, 2, 2\)"),
        ({"a": 1.0}, r"targets of train have the shapes {'a': \(\)}"),
        (np.arange(60) + 1j, "target 'target' of train is complex128; expected real numbers"),
        (pd.date_range("2020", periods=60).to_series(name="day"), "target 'day' of train is datetime64"),
        (pd.DataFrame(np.eye(60)[:, :2], columns=["a", "a"]), "targets of train have 'a' more than once"),
        (np.arange(60) * 1e200, r"target 'target' of train has values up to 5.9e\+201, whose squares"),
    ],
)
def test_what_is_no_target_is_refused_in_a_line(targets, words):
    layers = {0: made_up(60, 4, seed=0)[0]}
    with pytest.raises(ValueError, match=words) as error:
        probe_targets(layers, layers, targets, targets, **QUIET)
    assert "\n" not in str(error.value)


def test_tensors_are_layers_and_targets():
    (x, y), (x_test, y_test) = made_up(60, 4, seed=0), made_up(50, 4, seed=1)
    wanted = probe_targets({0: x}, {0: x_test}, y.to_numpy(), y_test.to_numpy(), **QUIET).table
    layers = [{0: torch.tensor(values, requires_grad=True)} for values in (x, x_test)]
    targets = [torch.tensor(split.to_numpy(), requires_grad=True) for split in (y, y_test)]
    assert wanted.equals(probe_targets(*layers, *targets, **QUIET).table)
    low = {0: layers[0][0].bfloat16()}, {0: layers[1][0].half()}
    plain = [{0: side[0].detach().float().numpy()} for side in low]
    pd.testing.assert_frame_equal(
        probe_targets(*low, y, y_test, **QUIET).table, probe_targets(*plain, y, y_test, **QUIET).table
    )


def test_of_two_images_r2_has_no_lower_end():
    """Half of the draws are of one image twice, of no variance."""
    value, low, high = r2_with_interval(np.array([[[1.0], [2.0]]]), np.array([[0.0], [1.0]]))
    assert (value.item(), low.item(), high.item()) == (1 - 1.5 / 0.25, -np.inf, 1 - 1.5 / 0.25)


def test_the_figure_shows_each_target_and_raw_pixels_beside():
    table = target_table()
    ax = target_curves(table.sample(frac=1, random_state=0))
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines["t3"].get_xydata(), [[0, 0.15], [1, 0.4], [2, 0.65]])
    assert ax.get_ylim()[0] == -0.25 and ax.get_xlim()[1] == 3.5 and len(ax.collections) == 10
    assert lines["raw pixels"].get_xydata().tolist() == [[3, 0.5]]
    with pytest.raises(ValueError, match="the table lacks chosen"):
        target_curves(table.drop(columns="chosen"))
    with pytest.raises(ValueError, match="more than one row for the same control, layer and target"):
        target_curves(pd.concat([table, table]))


def test_the_command_of_properties(tiny_folder, tiny_images, tmp_path, capsys):
    options = ["--store", str(tmp_path / "stores"), "--out", str(tmp_path)]
    assert cli.main(["properties", str(tiny_folder), str(tiny_images), *options]) == 0
    assert any(line.startswith("brightness: R² ") for line in capsys.readouterr().out.splitlines())
    table = pd.read_csv(tmp_path / "properties.csv")
    assert set(table.layer) == {0, 1, 2, 3} and "symmetry" in set(table.target)
    assert table.groupby("target").chosen.sum().eq(1).all() and (tmp_path / "properties.pdf").exists()
