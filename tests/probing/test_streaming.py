"""Streamed probes against torch.optim, against the optimum, and against themselves after a kill."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from tqdm.auto import tqdm

from igpt_lab.core import cluster
from igpt_lab.core.hub import CheckpointError
from igpt_lab.features.manifest import FeatureKey
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter
from igpt_lab.figures import LAYER_COLUMNS
from igpt_lab.probing import probes
from igpt_lab.probing.features import Features
from igpt_lab.probing.solvers import row_reader, sgd
from igpt_lab.probing.solvers.logistic import fit_logistic
from igpt_lab.probing.solvers.row_reader import Rows, Shuffled, measure
from igpt_lab.probing.streaming import probe_on_cluster, probe_streaming

STRENGTHS = (0.3, 1.5, 0.8)  # of the classes, by layer
NAMES = [f"ln_1.{layer}" for layer in range(3)]
QUICK = {"steps": 40, "batch_size": 16, "learning_rates": (1.0, 0.1), "device": "cpu", "progress": False}


def planted(n: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Three layers of five features of unequal scale and place, and labels of three classes."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=n)
    layers = [strength * np.eye(3, 5)[labels] + generator.normal(size=(n, 5)) for strength in STRENGTHS]
    return {
        name: (x * [1, 50, 0.1, 1, 1] + 7).astype(np.float32) for name, x in zip(NAMES, layers, strict=True)
    }, labels


def write(root: Path, train, test, parts: int = 7) -> FeatureStore:
    """A store of two splits, train in parts of unequal size, with rows of the source from 1000 on."""
    sizes = {"train": len(train[1]), "test": len(test[1])}
    key = FeatureKey(
        model="m", weights="", palette="", size=0, resample="", crop="", images="i",
        splits={split: ("", n) for split, n in sizes.items()}, layers={"ln_1": [0, 1, 2]}, pool="mean",
        alignment="sos", dtype="float32",
    )  # fmt: skip
    store = StoreWriter.create(root, key, {"train": parts, "test": 2})
    for split, (layers, labels), count in (("train", train, parts), ("test", test, 2)):
        ends = (len(labels) * (np.arange(count + 1) / count) ** 1.2).astype(int)
        for n, rows in enumerate(map(slice, ends, ends[1:])):
            values = {name: x[rows] for name, x in layers.items()}
            part_labels = None if labels.min() < 0 else labels[rows]
            store.write_part(split, n, np.arange(1000, 1000 + len(labels))[rows], part_labels, values, {})
    return FeatureStore.open(store.path)


TRAIN, TEST = planted(300, 0), planted(120, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    return write(tmp_path_factory.mktemp("store"), TRAIN, TEST)


def rows_of(store: FeatureStore, sides=(0, 1), names=NAMES, device="cpu") -> Rows:
    measured = measure(store, "train", names, holdout=0.1, seed=0)
    return Rows(store, "train", names, measured.scaling(sides), measured=measured, sides=sides, device=device)


@pytest.mark.parametrize("name, sides", [("choose", (0,)), ("refit", (0, 1))])
def test_a_head_is_that_of_torch_optim(store, tmp_path, name, sides):
    table = probe_streaming(store, **QUICK, layers=[1], buffer=60, state=tmp_path).table
    rate = 1.0 if name == "choose" else table.learning_rate[0]
    linear = torch.nn.Linear(5, 3)
    torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    optimiser = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=40)
    batches = Shuffled(rows_of(store, sides, NAMES[1:2]), 60).batches(16)
    for _ in range(40):
        x, y = next(batches)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(linear(x[0, :, :-1]), y).backward()
        optimiser.step()
        schedule.step()
    weights = load_file(tmp_path / f"{name}.safetensors")["weights"][0, :, -1]
    expected = torch.cat([linear.weight.T, linear.bias[None]]).detach()
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_all_heads_at_once_equal_one_at_a_time(store, tmp_path):
    together = probe_streaming(store, **QUICK, state=tmp_path / "all")
    weights = load_file(tmp_path / "all/choose.safetensors")["weights"]
    assert weights.shape == (3, 6, 2, 3)
    for layer in range(3):
        for i, rate in enumerate((0.1, 1.0)):
            one = tmp_path / f"{layer} {rate}"
            alone = probe_streaming(store, **QUICK | {"learning_rates": [rate]}, layers=[layer], state=one).table
            own_weights = load_file(one / "choose.safetensors")["weights"]
            torch.testing.assert_close(own_weights[0, :, 0], weights[layer, :, i], rtol=1e-5, atol=1e-6)
            row = together.table.loc[layer]
            if row.learning_rate == rate:
                assert alone.test_accuracy[0] == row.test_accuracy and alone.objective[0] == pytest.approx(
                    row.objective, rel=1e-5
                )


def test_enough_steps_reach_the_optimum(store):
    table = probe_streaming(store, **QUICK | {"steps": 3000, "batch_size": 64}).table
    x = np.stack([TRAIN[0][name] for name in NAMES])
    best = fit_logistic(x, TRAIN[1], [1e7], max_iter=5000)
    gap = table.objective.to_numpy() - best.objective[:, 0]
    assert (gap > -1e-6).all() and (gap < 5e-4).all()
    for layer, name in enumerate(NAMES):
        assert abs(table.test_accuracy[layer] - (best.predict(TEST[0][name], layer)[0] == TEST[1]).mean()) <= 2 / 120
    assert table.chosen.tolist() == [False, True, False]


def test_the_table_says_how_its_heads_were_made(store, tmp_path):
    result = probe_streaming(store, **QUICK, state=tmp_path, tol=1.0, control="x")
    table, weights = result.table, load_file(tmp_path / "refit.safetensors")["weights"]
    assert set(LAYER_COLUMNS) <= set(table) and table.control.eq("x").all()
    for layer, name in enumerate(NAMES):
        x, y = TRAIN[0][name].astype(float), torch.as_tensor(TRAIN[1])
        z = torch.as_tensor((x - x.mean(0)) / x.std(0))
        w = weights[layer, :, 0].double().requires_grad_()
        loss = torch.nn.functional.cross_entropy(z @ w[:-1] + w[-1], y)
        loss.backward()
        row = table.loc[layer]
        assert row.objective == pytest.approx(loss.item(), rel=1e-5)
        assert row.gradient == pytest.approx(w.grad.abs().max().item(), rel=1e-3)
        theirs = (TEST[0][name] - x.mean(0)) / x.std(0)
        right = (theirs @ w.detach()[:-1].numpy() + w.detach()[-1].numpy()).argmax(1) == TEST[1]
        assert row.test_accuracy == right.mean() and (result.correct[layer] == right).all()
    assert table.converged.all() and table.at_edge.all()  # of two rates either is at an edge
    strict = probe_streaming(store, **QUICK | {"learning_rates": (1.0,)}, state=tmp_path / "one").table
    assert not strict.converged.any() and not strict.at_edge.any()
    assert table.n_train.eq(300).all() and table.n_test.eq(120).all() and table.n_features.eq(5).all()


def test_the_rate_is_chosen_on_rows_that_no_head_has_seen(store, tmp_path):
    table = probe_streaming(store, **QUICK, refit=False, state=tmp_path).table
    weights = load_file(tmp_path / "choose.safetensors")["weights"].double().numpy()
    held = row_reader.sides_of(np.arange(1000, 1300), 0.1, 0) == 1
    assert table.n_train.eq(300 - held.sum()).all() and not (tmp_path / "refit.safetensors").exists()
    for layer, name in enumerate(NAMES):
        x, y = TRAIN[0][name].astype(float), TRAIN[1]
        z = (x - x[~held].mean(0)) / x[~held].std(0)
        scores = [(z[held] @ w[:-1] + w[-1]).argmax(1) == y[held] for w in np.moveaxis(weights[layer], 1, 0)]
        scores = [hits.mean() for hits in scores]
        assert table.validation_accuracy[layer] == max(scores)
        assert table.learning_rate[layer] == (0.1, 1.0)[int(np.argmax(scores))]
    spoiled = {name: np.where(held[:, None], 1e6, x).astype(np.float32) for name, x in TRAIN[0].items()}
    other = write(tmp_path / "spoiled", (spoiled, TRAIN[1]), TEST)
    probe_streaming(other, **QUICK, refit=False, state=tmp_path / "other")
    again = load_file(tmp_path / "other/choose.safetensors")["weights"].double().numpy()
    np.testing.assert_allclose(again, weights, rtol=1e-5, atol=1e-6)


def test_sides_are_by_row_and_in_proportion(store, tmp_path):
    index = np.arange(100_000)
    held = row_reader.sides_of(index, 0.1, 3)
    assert abs(held.mean() - 0.1) < 5 * math.sqrt(0.09 / len(index))
    order = np.random.default_rng(0).permutation(index)
    np.testing.assert_array_equal(row_reader.sides_of(order, 0.1, 3), held[order])
    assert abs(held[row_reader.sides_of(index, 0.1, 4) == 1].mean() - 0.1) < 0.02
    coarse = measure(write(tmp_path, TRAIN, TEST, parts=2), "train", NAMES, holdout=0.1, seed=0)
    fine = measure(store, "train", NAMES, holdout=0.1, seed=0)
    np.testing.assert_array_equal(coarse.counts.sum(0), fine.counts.sum(0))
    rows = row_reader.sides_of(np.arange(1000, 1300), 0.1, 0)
    for sides in ((0,), (1,), (0, 1)):
        x = np.stack([TRAIN[0][name][np.isin(rows, sides)].astype(float) for name in NAMES])
        for measured in (coarse, fine):
            np.testing.assert_allclose(measured.scaling(sides)[:, :, 0], [x.mean(1), x.std(1)], rtol=1e-12)


def test_features_far_from_zero_or_constant_are_standardised(tmp_path):
    layers = {name: x.copy() for name, x in TRAIN[0].items()}
    layers["ln_1.0"][:, 0] = 0.1  # not exact in float32
    layers["ln_1.0"][:, 1] = 1e6 + np.arange(300)
    scaling = measure(write(tmp_path, (layers, TRAIN[1]), TEST), "train", NAMES, holdout=0.1, seed=0).scaling((0, 1))
    assert scaling[1, 0, 0, 0] == 1
    assert scaling[:, 0, 0, 1] == pytest.approx([1e6 + 149.5, np.arange(300).std()], rel=1e-12)


def stream(store, seed, rows, size=16, start=0, buffer=80) -> np.ndarray:
    """Rows in the order in which batches bring them; row i has the feature i."""
    measured = measure(store, "train", NAMES[:1], holdout=0.1, seed=seed)
    source = Rows(store, "train", NAMES[:1], measured.scaling((0, 1)), measured=measured)
    mean, scale = measured.scaling((0, 1))[:, 0, 0, 0]
    batches, seen = Shuffled(source, buffer).batches(size, start), []
    while len(seen) * size < rows:
        x, y = next(batches)
        seen.append((x[0, :, 0].double() * scale + mean).round().long().numpy())
        np.testing.assert_array_equal(y, TRAIN[1][seen[-1]])
        assert x.shape == (1, size, 6) and (x[..., -1] == 1).all()
    return np.concatenate(seen)


@pytest.mark.parametrize("buffer", [1, 80, None])
def test_the_order_visits_every_row_once_an_epoch_and_is_a_function_of_the_seed(tmp_path, buffer):
    numbered = {name: np.repeat(np.arange(300, dtype=np.float32)[:, None], 5, 1) for name in NAMES}
    store = write(tmp_path, (numbered, TRAIN[1]), TEST)
    order = stream(store, 0, 900, buffer=buffer)
    for epoch in order[:900].reshape(3, 300):
        assert sorted(epoch) == list(range(300))
    assert not np.array_equal(order[:300], order[300:600]) and np.abs(np.diff(order[:300])).min() > 0
    assert (np.diff(order[:300]) == 1).mean() < 0.1  # not as the store has them
    np.testing.assert_array_equal(stream(store, 0, 900, buffer=buffer), order)
    assert not np.array_equal(stream(store, 1, 900, buffer=buffer), order)
    for start in (1, 7, 19, 40):
        np.testing.assert_array_equal(stream(store, 0, 160, start=start, buffer=buffer), order[start * 16 :][:160])
    np.testing.assert_array_equal(stream(store, 0, 900, size=100, buffer=buffer), order[:900])  # wider than parts


def interrupted(monkeypatch, after: int) -> None:
    """The probe's step number `after`, counted over both of its runs, raises KeyboardInterrupt."""
    count, real = iter(range(10**6)), sgd.Heads.step

    def step(*arguments, **named):
        if next(count) == after:
            raise KeyboardInterrupt
        real(*arguments, **named)

    monkeypatch.setattr(sgd.Heads, "step", step)


@pytest.mark.parametrize("after", [3, 22, 40, 75])
def test_an_interrupted_run_goes_on_to_the_same_bits(store, tmp_path, monkeypatch, after):
    options = QUICK | {"buffer": 60, "save_every": 7}
    straight = probe_streaming(store, **options, state=tmp_path / "straight").table
    interrupted(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        probe_streaming(store, **options, state=tmp_path / "killed")
    monkeypatch.undo()
    taken = []
    real = sgd.Heads.step
    monkeypatch.setattr(sgd.Heads, "step", lambda *a, **b: taken.append(1) or real(*a, **b))
    assert probe_streaming(store, **options, state=tmp_path / "killed").table.equals(straight)
    assert len(taken) == 80 - (after // 7 * 7 if after < 40 else 40 + (after - 40) // 7 * 7)
    for file in sorted((tmp_path / "straight").iterdir()):
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()
    assert probe_streaming(store, **options, state=tmp_path / "killed").table.equals(straight)
    assert len(taken) <= 80  # what is finished takes no step
    assert probe_streaming(store, **options).table.equals(straight)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_goes_on_to_the_same_bits(store, tmp_path):
    code = f"""
import os, signal
from igpt_lab.features.store import FeatureStore
from igpt_lab.probing import streaming
from igpt_lab.probing.solvers import sgd
steps, real = iter(range(99)), sgd.Heads.step
def step(*arguments, **named):
    if next(steps) == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments, **named)
sgd.Heads.step = step
streaming.probe_streaming(FeatureStore.open({str(store.path)!r}), **{QUICK!r}, save_every=7, state={str(tmp_path)!r})
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == -signal.SIGKILL
    with safe_open(tmp_path / "refit.safetensors", "pt") as file:
        assert json.loads(file.metadata()["about"])["step"] == 7
    probe_streaming(store, **QUICK, save_every=7, state=tmp_path)
    probe_streaming(store, **QUICK, save_every=7, state=tmp_path / "straight")
    for file in (tmp_path / "straight").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_states_that_do_not_fit_are_refused(store, tmp_path):
    probe_streaming(store, **QUICK, state=tmp_path)
    for change in ({"steps": 41}, {"seed": 1}, {"layers": [1]}, {"buffer": 50}, {"learning_rates": (1.0,)}):
        with pytest.raises(ValueError, match=f"of another run: .*{next(iter(change))} is .* there, .* here"):
            probe_streaming(store, **QUICK | change, state=tmp_path)
    other = write(tmp_path / "other", planted(300, 5), TEST)
    with pytest.raises(ValueError, match="of another run: parts is"):
        probe_streaming(other, **QUICK, state=tmp_path)
    file = tmp_path / "choose.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="choose.safetensors cannot be read .*; delete it to begin again"):
        probe_streaming(store, **QUICK, state=tmp_path)
    save_file({"weights": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        probe_streaming(store, **QUICK, state=tmp_path)
    file.write_bytes(whole)
    probe_streaming(store, **QUICK, state=tmp_path)


def test_the_rows_in_memory_are_bounded(tmp_path, monkeypatch):
    store = write(tmp_path, planted(2000, 0), planted(500, 1), parts=60)
    largest = max(n for split in store.splits for *_, n in store.row_groups(split))
    arrays, tensors, peaks = [], [], []

    def note():
        live = sum(len(ref()) for ref in arrays if ref() is not None)
        peaks.append(live + sum(n for ref, n in tensors if not ref.expired()))

    row_group, read, load = FeatureStore.row_group, Rows.read, Shuffled._load

    def noted_row_group(*arguments):
        columns = row_group(*arguments)
        arrays.append(weakref.ref(columns["ln_1.2"]))
        note()
        return columns

    def noted_read(self, number):
        x, y = read(self, number)
        tensors.append((StorageWeakRef(x.untyped_storage()), x.shape[1]))
        note()
        return x, y

    def noted_load(self, window):
        fresh = self.x is None
        loaded = load(self, window)
        if fresh:
            tensors.append((StorageWeakRef(self.x.untyped_storage()), self.x.shape[1]))
        note()
        return loaded

    monkeypatch.setattr(FeatureStore, "row_group", noted_row_group)
    monkeypatch.setattr(Rows, "read", noted_read)
    monkeypatch.setattr(Shuffled, "_load", noted_load)
    probe_streaming(store, **QUICK | {"steps": 300}, buffer=300)
    assert largest < 300 < max(peaks) <= 300 + 2 * largest
    peaks.clear()
    probe_streaming(store, **QUICK, buffer=1)
    assert max(peaks) <= 3 * largest


def test_rows_that_fit_the_buffer_are_read_once(store, monkeypatch):
    source, read = rows_of(store), []
    real = FeatureStore.row_group
    monkeypatch.setattr(FeatureStore, "row_group", lambda *arguments: read.append(1) or real(*arguments))
    batches = Shuffled(source).batches(16)
    for _ in range(100):
        next(batches)
    assert len(read) == 7


def test_test_labels_are_met_once(store, monkeypatch):
    labels, row_group = FeatureStore.labels, FeatureStore.row_group

    def poisoned(self, split):
        assert split != "test", "test labels were read outside the one function"
        return labels(self, split)

    def poisoned_group(self, split, part, group, columns):
        assert split != "test" or "label" not in columns, "test labels were read outside the one function"
        return row_group(self, split, part, group, columns)

    monkeypatch.setattr(FeatureStore, "labels", poisoned)
    monkeypatch.setattr(FeatureStore, "row_group", poisoned_group)
    meet = probes.meet_test
    monkeypatch.setattr(
        probes,
        "meet_test",
        lambda predictions, *_: ({key: np.ones(len(p), bool) for key, p in predictions.items()}, {}),
    )
    blind = probe_streaming(store, **QUICK).table
    assert blind.test_accuracy.eq(1).all()
    monkeypatch.setattr(probes, "meet_test", meet)
    with pytest.raises(AssertionError, match="outside the one function"):
        probe_streaming(store, **QUICK)
    monkeypatch.undo()
    unseen = ["layer", "learning_rate", "validation_accuracy", "chosen", "objective", "gradient"]
    assert blind[unseen].equals(probe_streaming(store, **QUICK).table[unseen])


def test_no_step_waits_for_the_device(store):
    """Nothing can be read back from the meta device."""
    rows = rows_of(store, device="meta")
    options = {"bar": tqdm(disable=True), "name": "x", "run": {}, "state": None, "save_every": 1}
    plan = sgd.Plan(30, 16, 0.9, [1.0, 0.1], 0.1, 0, 60)
    heads = sgd.train_heads(rows, np.ones((3, 2)), plan=plan, **options)
    assert heads.weights.device.type == "meta" and heads.only(np.zeros(3, int)).weights.shape == (3, 6, 1, 3)


def test_a_store_in_the_order_of_its_classes_is_told(tmp_path):
    order = np.argsort(TRAIN[1], kind="stable")
    layers = {name: x[order] for name, x in TRAIN[0].items()}
    ordered = write(tmp_path, (layers, TRAIN[1][order]), TEST, parts=20)
    with pytest.warns(UserWarning, match="rows that are shuffled together may have 1 of 3 classes: raise buffer"):
        probe_streaming(ordered, **QUICK, buffer=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe_streaming(ordered, **QUICK)


def test_an_estimate_comes_first(store, capsys):
    probe_streaming(store, **QUICK | {"progress": True}, buffer=60)
    said = capsys.readouterr().out
    assert "3 layers, 2 rates, 3 classes" in said and "GB of memory, about" in said and "s on cpu" in said


def test_labels_of_any_numbers(tmp_path):
    names = np.array([3, 40, 7])
    plain, named = (write(tmp_path / key, (TRAIN[0], f(TRAIN[1])), (TEST[0], f(TEST[1]))) for key, f in (
        ("plain", lambda y: np.array([0, 2, 1])[y]), ("named", lambda y: names[y])
    ))  # fmt: skip
    assert probe_streaming(plain, **QUICK).table.equals(probe_streaming(named, **QUICK).table)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"step": 40}, "probe_layers takes no 'step'"),
        ({"learning_rates": (1.0,)}, "probe_layers takes no 'learning_rates' .with steps= probe_streaming runs"),
        ({"steps": 40, "learning_rate": (1.0,)}, "probe_streaming takes no 'learning_rate' .*; did you mean"),
        ({"steps": 40, "Cs": (1.0,)}, "probe_streaming takes no 'Cs'"),
    ],
)
def test_options_of_the_other_probe_are_refused_before_any_work(store, options, says):
    with pytest.raises(TypeError, match=says):
        probe_on_cluster(store, scheduler="tcp://nobody:1", progress=False, **options)


@pytest.mark.parametrize("options", [{}, QUICK | {"refit": False}])
def test_a_layer_of_a_cluster_is_that_of_one_process(store, monkeypatch, options):
    def run_here(work, tasks, **_):
        probe = pickle.loads(pickle.dumps(work)).open()
        yield from [(name, probe(*arguments)) for name, arguments in tasks]

    monkeypatch.setattr(cluster, "run", run_here)
    there = probe_on_cluster(store, layers=[2, 1], **{"device": "cpu", "progress": False} | options)
    if options:
        here = probe_streaming(store, layers=[1, 2], **options)
    else:
        train, test = (Features.from_store(store, split) for split in ("train", "test"))
        here = probes.probe_layers(train, test, device="cpu", progress=False)
    exact = ["layer", "validation_accuracy", "test_accuracy"]
    rows = here.table[here.table.layer > 0].reset_index(drop=True)
    assert there.table[exact].equals(rows[exact])
    assert there.table.objective.to_numpy() == pytest.approx(rows.objective.to_numpy(), rel=1e-6)


def test_rows_that_were_not_measured_have_no_labels(store):
    rows = Rows(store, "test", NAMES, np.ones((2, 3, 1, 5)))
    assert all((y == -1).all() for _, y in rows.scan(50))
    with pytest.raises(ValueError, match="the rows of test were not measured"):
        Shuffled(rows)


def test_bad_input(store, tmp_path):
    with pytest.raises(KeyError, match=r"no layers \[0, 9\] at 'ln_1'"):
        probe_streaming(store, **QUICK, layers=[0, 9])
    with pytest.raises(KeyError, match="no split 'tset'"):
        probe_streaming(store, **QUICK, test="tset")
    for change in ({"steps": 0}, {"batch_size": 0}, {"buffer": 0}, {"holdout": 1.0}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match="expected .*; got Plan|expected at least 1"):
            probe_streaming(store, **QUICK | change)
    for rates in ((), (1.0, 0.0), (math.inf,), (math.nan,)):
        with pytest.raises(ValueError, match="expected (one or more numbers above 0|at least one)"):
            probe_streaming(store, **QUICK | {"learning_rates": rates})
    with pytest.raises(FloatingPointError, match="lower learning_rates"):
        probe_streaming(store, **QUICK | {"learning_rates": (3e38,)})
    with pytest.raises(ValueError, match="train has 3 classes and rows to fit and held out .*holdout=1e-09"):
        probe_streaming(store, **QUICK, holdout=1e-9)
    one = write(tmp_path / "one", (TRAIN[0], np.zeros(300, int)), TEST)
    with pytest.raises(ValueError, match="train has 1 classes"):
        probe_streaming(one, **QUICK)
    unlabelled = write(tmp_path / "unlabelled", (TRAIN[0], np.full(300, -1)), TEST)
    with pytest.raises(ValueError, match="needs labels, and .*part-00000.* has .* rows without one"):
        probe_streaming(unlabelled, **QUICK)
    hidden = write(tmp_path / "hidden", TRAIN, (TEST[0], np.full(120, -1)))
    with pytest.raises(ValueError, match="needs labels, and test of .* has none"):
        probe_streaming(hidden, **QUICK)
    for split in ("train", "test"):
        splits = {"train": planted(300, 0), "test": planted(120, 1)}
        splits[split][0]["ln_1.1"][5, 2] = np.nan
        with pytest.raises(ValueError, match=f"{split}.* has values that are not finite"):
            probe_streaming(write(tmp_path / f"nan {split}", **splits), **QUICK)
