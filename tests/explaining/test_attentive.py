"""The attentive probe and the probe of the mean: laws, a case by hand, and both models."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from transformers_peer import transformers

import igpt_lab as lab
from conftest import assert_means
from igpt_lab.explaining.attentive import states_of
from igpt_lab.explaining.attentive_fit import Scale, Training, attend, fit_both, held_out, scale_of_states

COLUMNS = (
    "layer probe seed test_accuracy low high log_loss log_loss_low log_loss_high validation_accuracy epochs parameters "
    "chosen drop drop_low drop_high drop_p n_train n_validation n_test"
).split()
FEW = {"epochs": 2, "batch_size": 16, "queries": 2, "progress": False}


def weights_of(seeds=2, queries=2, width=6, classes=3):
    generator = torch.Generator().manual_seed(0)
    shapes = {"queries": (queries, width), "values": (queries, width, width // queries)}
    shapes |= {"classes": (width, classes), "bias": (1, classes)}
    return {name: torch.randn(seeds, *shape, generator=generator) for name, shape in shapes.items()}


def tokens_and_labels(n=40):
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 2
    return generator.integers(4 * labels[:, None], 4 * labels[:, None] + 4, (n, 16)), labels


def test_queries_of_zeros_are_a_linear_probe_on_the_mean_of_the_values():
    states, weights = torch.randn(5, 7, 6), weights_of()
    weights["queries"].zero_()
    got = attend(weights, states, scale := scale_of_states(states))
    for s in range(2):
        values = torch.cat(list(weights["values"][s]), dim=1)  # (D, D)
        linear = ((states - scale.mean) @ scale.of_values @ values).mean(1) @ weights["classes"][s]
        torch.testing.assert_close(got[s], linear + weights["bias"][s])


def test_attention_is_torchs_own():
    states, weights = torch.randn(5, 7, 6), weights_of()
    unit = Scale(torch.zeros(6), torch.ones(6), torch.eye(6), torch.eye(6))
    for s, got in enumerate(attend(weights, states, unit)):
        heads = []
        for query, values in zip(weights["queries"][s], weights["values"][s], strict=True):
            of_all = query.expand(5, 1, 6)
            heads.append(torch.nn.functional.scaled_dot_product_attention(of_all, states, states)[:, 0] @ values)
        torch.testing.assert_close(got, torch.cat(heads, 1) @ weights["classes"][s] + weights["bias"][s])


def test_permuted_positions_change_nothing():
    states, weights = torch.randn(50, 7, 6), weights_of()
    scale, others = scale_of_states(states), scale_of_states(states[:, torch.randperm(7)])
    torch.testing.assert_close(vars(others), vars(scale))
    torch.testing.assert_close(attend(weights, states[:, torch.randperm(7)], scale), attend(weights, states, scale))


def marked(n, seed, positions=64):
    """States of noise, and a marked one of two classes at any position: (n, positions, 8) and (n,)."""
    generator = np.random.default_rng(seed)
    labels, place = np.arange(n) % 2, generator.integers(positions, size=n)
    states = generator.normal(size=(n, positions, 8)).astype(np.float32)
    states[:, :, 0] = 0
    states[np.arange(n), place, :2] = np.stack([np.full(n, 8.0), 2.0 * labels - 1], axis=1)
    return torch.as_tensor(states), labels


def test_where_one_position_carries_the_class_attention_sees_it_and_the_mean_does_not():
    (states, y), (others, want) = marked(600, 0), marked(400, 1)
    fits = fit_both(states, y, held_out(y, [0, 1]), [0, 1], 2, Training(40, 40, 50, 3e-2))
    attentive, mean = ((readout(others).argmax(-1).numpy() == want).mean(1) for readout, _ in fits)
    assert attentive.min() == 1 and mean.max() < 0.65


def test_the_probe_of_the_mean_finds_what_is_linear_and_as_well_as_a_logistic_regression():
    generator = np.random.default_rng(0)
    y = np.arange(400) % 3
    states = torch.as_tensor(generator.normal(size=(400, 4, 6)) + np.eye(6)[y][:, None], dtype=torch.float32)
    train, test = slice(300), slice(300, 400)
    fits = fit_both(states[train], y[train], held_out(y[train], [0]), [0], 2, Training(30, 5, 50, 1e-2))
    means = states.mean(1).numpy()
    peer = LogisticRegression().fit(means[train], y[train]).score(means[test], y[test])
    for readout, fitted in fits:
        accuracy = (readout(states[test])[0].argmax(-1).numpy() == y[test]).mean()
        assert abs(accuracy - peer) < 0.06 and 1 <= fitted.epochs[0] <= 30


def test_a_seed_is_the_same_alone_and_beside_others():
    states, y = marked(100, 0, positions=5)
    training = Training(3, 5, 32, 1e-2)
    for alone, beside in zip(
        fit_both(states, y, held_out(y, [1]), [1], 2, training),
        fit_both(states, y, held_out(y, [0, 1]), [0, 1], 2, training),
        strict=True,
    ):
        assert alone[1].epochs[0] == beside[1].epochs[1]
        torch.testing.assert_close(alone[0](states)[0], beside[0](states)[1], atol=1e-4, rtol=1e-4)


def test_scales_are_those_of_numpy_and_a_feature_that_never_varies_stays():
    states = torch.randn(300, 4, 3) * torch.tensor([1.0, 5, 0]) + torch.tensor([0.0, 2, 7])
    scale = scale_of_states(states)
    x = states.double().numpy()
    np.testing.assert_allclose(scale.mean, x.mean((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scale.of_keys[:2], x.std((0, 1))[:2], rtol=1e-4)
    assert scale.of_keys[2] == 1
    of_means = np.cov(x.mean(1).T, ddof=0)
    of_values = of_means + np.cov(x.reshape(-1, 3).T, ddof=0) / 4
    for covariance, white in ((of_values, scale.of_values), (of_means, scale.of_means)):
        white = white.double().numpy()
        np.testing.assert_allclose((white.T @ covariance @ white)[:2, :2], np.eye(2), atol=1e-4)


def test_the_table(tiny):
    tokens, labels = tokens_and_labels()
    probed = lab.probe_attentive(tiny, tokens, labels, tokens[:24], labels[:24], layers=[3, 1], seeds=[0, 5], **FEW)
    table = probed.table
    assert_means(probed, "test_accuracy")
    assert list(table) == COLUMNS
    assert table[["layer", "probe", "seed"]].to_numpy().tolist() == [
        [layer, probe, seed] for layer in (3, 1) for probe in ("attentive", "mean") for seed in (0, 5)
    ]
    assert (table.n_train == 40).all() and (table.n_validation == 4).all() and (table.n_test == 24).all()
    assert table.low.lt(table.test_accuracy + 1e-9).all() and table.epochs.between(1, 2).all()
    attentive, mean = (table.parameters[table.probe == probe].unique() for probe in ("attentive", "mean"))
    assert attentive == 2 * 8 + 8 * 8 + 8 * 2 + 2 and abs(attentive - mean) <= (8 + 2) / 2
    for _, rows in table.groupby(["probe", "seed"]):
        chosen, last = rows[rows.chosen], rows[rows.layer == 3]
        assert len(chosen) == 1
        assert rows["drop"].tolist() == pytest.approx(2 * [chosen.test_accuracy.item() - last.test_accuracy.item()])


def test_layers_that_memory_does_not_hold_together_are_as_in_one_pass(tiny):
    tokens, labels = tokens_and_labels()
    images = {"layers": [3, 0, 1], "seeds": [0], **FEW}
    want = lab.probe_attentive(tiny, tokens, labels, tokens[:24], labels[:24], **images).table
    for layers in (1.5, 2.5):
        memory = layers * tokens.size * 8 * 4 / 1e9
        got = lab.probe_attentive(tiny, tokens, labels, tokens[:24], labels[:24], memory=memory, **images).table
        pd.testing.assert_frame_equal(got, want)


def test_held_out_bits_are_the_log_loss_of_the_readouts(tiny):
    tokens, labels = tokens_and_labels()
    rows = lab.probe_attentive(tiny, tokens, labels, tokens[5:24], labels[5:24], layers=[2], seeds=[0, 5], **FEW).table
    states = states_of(tiny, tokens, ("ln_1", [2], "sos"), torch.float32)[0]
    fits = fit_both(states, labels, held_out(labels, [0, 5]), [0, 5], 2, Training(2, 5, 16, 3e-3))
    shares = [logits.softmax(-1).detach().numpy() for readout, _ in fits for logits in readout(states[5:24])]
    expected = [log_loss(labels[5:24], of_fit) / np.log(2) for of_fit in shares]
    np.testing.assert_allclose(rows.log_loss, expected, rtol=1e-4)


def test_labels_may_be_a_list_or_a_tensor(tiny):
    tokens, labels = tokens_and_labels()
    images = {"layers": [1], "seeds": [0], **FEW}
    want = lab.probe_attentive(tiny, tokens, labels, tokens[:24], labels[:24], **images).table
    for kind in (list, torch.as_tensor):
        got = lab.probe_attentive(tiny, tokens, kind(labels), tokens[:24], kind(labels[:24]), **images).table
        pd.testing.assert_frame_equal(got, want)
        change = lab.refit_after(tiny, tokens, kind(labels), tokens[:24], kind(labels[:24]), progress=False).table
        assert change.accuracy.notna().all()


@torch.no_grad()
def test_states_are_those_of_both_models(tiny, tiny_folder):
    tokens, labels = tokens_and_labels()
    port = transformers().ImageGPTForCausalImageModeling.from_pretrained(tiny_folder).eval()
    want = tiny(lab.models.losses.align(torch.as_tensor(tokens), "sos", tiny.config), output_hidden_states=True)
    for model in (tiny, port):
        states = states_of(model, tokens, ("resid_pre", [2, 1], "sos"), torch.float32)
        for got, layer in zip(states, (2, 1), strict=True):
            torch.testing.assert_close(got, want.hidden_states[layer], atol=1e-5, rtol=1e-5)
    table = lab.probe_attentive(port, tokens, labels, tokens, labels, layers=[2], seeds=[0], **FEW).table
    assert len(table) == 2


def test_a_bidirectional_model_and_bfloat16(tiny):
    tokens, labels = tokens_and_labels()
    model = type(tiny)(replace(tiny.config, bidirectional=True)).eval().bfloat16()
    options = FEW | {"dtype": "bfloat16", "seeds": [0]}
    for point, queries in (("mlp_act", 32), ("qkv", 24)):  # as many as the states are wide
        table = lab.probe_attentive(
            model, tokens, labels, tokens, labels, **options | {"point": point, "queries": queries}
        ).table
        assert table.layer.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": [4]}, ValueError, "layer 4 at ln_1; this model has layers 0..3 there"),
        ({"point": "ln1"}, ValueError, "did you mean 'ln_1'"),
        ({"queries": 3}, ValueError, "queries=3; expected a divisor of the width 8"),
        ({"queries": 16, "point": "qkv"}, ValueError, "queries=16; expected a divisor of the width 24 "),
        ({"dtype": "float8"}, ValueError, "dtype 'float8'; expected one of float32, bfloat16"),
        ({"memory": 1e-5}, MemoryError, "a layer's states of 40 images are 0.0 GB in float32, and memory=1e-05: give"),
        ({"seeds": []}, ValueError, "seeds is empty"),
        ({"patience": 0}, ValueError, "patience=0; expected a number above 0"),
    ],
)
def test_bad_options(tiny, options, error, words, monkeypatch):
    monkeypatch.setattr(type(tiny.transformer), "forward", None)  # before any work
    tokens, labels = tokens_and_labels()
    with pytest.raises(error, match=words):
        lab.probe_attentive(tiny, tokens, labels, tokens, labels, **FEW | options)


def test_bad_images(tiny):
    tokens, labels = tokens_and_labels()
    for other, of_other, words in (
        (tokens[:, :9], labels, "expected whole images"),
        (tokens + 4, labels, "the model's colours are 0 to 7"),
        (tokens, labels[1:], r"train: labels \(39,\) for 40 images"),
        (tokens, 0 * labels, "all of class 0"),
    ):
        with pytest.raises(ValueError, match=words):
            lab.probe_attentive(tiny, other, of_other, tokens, labels, **FEW)
    with pytest.raises(RuntimeError, match="training mode"):
        lab.probe_attentive(tiny.train(), tokens, labels, tokens, labels, **FEW)
