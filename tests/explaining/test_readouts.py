"""Bits by layer against scikit-learn, exact entropies of made-up data, and what each state holds by hand."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from transformers_peer import transformers

import igpt_lab as lab
from conftest import assert_means
from igpt_lab.explaining import linear_readout as of_states
from igpt_lab.explaining import readouts
from igpt_lab.explaining.linear_readout import classes_of, held_out, interval_over_images, linear_readout
from igpt_lab.explaining.readouts import TARGETS, bits_by_layer
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling

PLAIN = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TOKENS = np.random.default_rng(0).integers(0, 8, (6, 16))


def made_up(n: int, *, signal: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """States (n, 3, 6) and values (n, 3) in 0..3, of which as much is in four features as `signal` says."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 4, (n, 3))
    return signal * np.eye(4, 6)[values] + generator.normal(size=(n, 3, 6)), values


def nearly_dependent(n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """States (n, 3, 30): six features about values 0..3, and four copies of them with a little noise."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 4, (n, 3))
    first = 2 * np.eye(4, 6)[values] + generator.normal(size=(n, 3, 6))
    return np.concatenate([first, *(first + 0.03 * generator.normal(size=(4, *first.shape)))], -1), values


def network(**shape) -> ImageGPTForCausalImageModeling:
    """A random network whose colours and positions are linearly independent vectors."""
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=4, n_positions=16, n_head=2, **shape, **PLAIN))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        weight.data.normal_(float("ln_" in name), 1 if "w" in name.split(".")[-2] else 0.1, generator=generator)
    return model.eval()


def test_what_is_linear_in_the_state_is_read_whole_and_noise_says_nothing():
    read = linear_readout(*made_up(80, signal=50), *made_up(40, signal=50, seed=1))
    assert read.entropy - 0.01 < read.bits <= read.entropy and read.converged and read.n_classes == 4
    assert abs(read.entropy - 2) < 0.05
    noise = linear_readout(*made_up(80, signal=0), *made_up(40, signal=0, seed=1))
    low, high = interval_over_images(noise.gains[None])
    assert low < noise.bits < high and low < 0 and noise.bits < 0.02


def test_a_state_that_is_constant_has_exactly_no_bits():
    (x, y), (x_test, y_test) = made_up(30, signal=0), made_up(20, signal=0, seed=1)
    read = linear_readout(np.ones_like(x), y, np.ones_like(x_test), y_test, tol=1e-8)
    np.testing.assert_allclose(read.gains, 0, atol=1e-6)


def test_the_log_loss_is_that_of_scikit_learn():
    (x, y), (x_test, y_test) = made_up(60, signal=2), made_up(30, signal=2, seed=1)
    read = linear_readout(x, y, x_test, y_test, tol=1e-7)
    scaler = StandardScaler().fit(x.reshape(-1, 6))
    peer = LogisticRegression(C=read.C, tol=1e-9, max_iter=10_000).fit(scaler.transform(x.reshape(-1, 6)), y.ravel())
    p = peer.predict_proba(scaler.transform(x_test.reshape(-1, 6)))
    assert read.log_loss == pytest.approx(log_loss(y_test.ravel(), p) / np.log(2), abs=1e-4)
    shares = np.bincount(y.ravel()) / y.size
    entropy = log_loss(y_test.ravel(), np.tile(shares, (y_test.size, 1))) / np.log(2)
    assert read.entropy == pytest.approx(entropy) and read.bits == pytest.approx(read.entropy - read.log_loss)


def test_the_strength_is_that_of_fits_that_have_converged():
    """A fit that ends early acts as one with a stronger penalty, so a weak penalty would be taken for a good one."""
    (x, y), (x_test, y_test) = nearly_dependent(60), nearly_dependent(30, seed=1)
    rest, held = held_out(len(x), 0)
    scaler = StandardScaler().fit(x[rest].reshape(-1, 30))
    train, of_held = (scaler.transform(x[images].reshape(-1, 30)) for images in (rest, held))
    losses = []
    for C in of_states.STRENGTHS:
        peer = LogisticRegression(C=C, tol=1e-9, max_iter=100_000).fit(train, y[rest].ravel())
        losses.append(log_loss(y[held].ravel(), peer.predict_proba(of_held), labels=range(4)))
    behind_it_rises = of_states.STRENGTHS[np.flatnonzero(np.diff(losses) >= 0)[0]]
    assert linear_readout(x, y, x_test, y_test).C == behind_it_rises
    assert linear_readout(x, y, x_test, y_test, tol=1e-2).C > behind_it_rises


def test_no_image_is_on_both_sides(monkeypatch):
    (x, y), test = made_up(20, signal=2), made_up(10, signal=2, seed=1)
    fitted, fit = [], of_states.fit_path
    monkeypatch.setattr(of_states, "fit_path", lambda rows, *a, **k: fitted.append(rows) or fit(rows, *a, **k))
    linear_readout(x, y, *test, seed=3)
    rest, held = held_out(20, 3)
    assert len(held) == 4 and sorted([*rest, *held]) == list(range(20))
    choosing, last = fitted
    assert np.array_equal(choosing, x[rest].reshape(-1, 6))
    assert np.array_equal(last, x.reshape(-1, 6))


def test_rare_and_unseen_values_are_one_class():
    assert classes_of(np.array([[0, 0], [2, 2], [3, 1]]), 5).tolist() == [0, 2, 1, 2, 2]
    assert classes_of(np.array([0, 0, 0, 1, 1]), 2).tolist() == [0, 1]
    assert classes_of(np.array([0, 0, 0, 1, 1, 3, 3, 3]), 4).tolist() == [0, 2, 2, 1]  # the rarest joins the unseen
    (x, y), (x_test, y_test) = made_up(30, signal=5), made_up(20, signal=5, seed=1)
    read = linear_readout(x, np.where(y == 3, 0, y), x_test, y_test)
    assert np.isfinite(read.gains).all() and read.n_classes == 3
    with pytest.raises(ValueError, match="expected two values or more"):
        linear_readout(x, np.zeros_like(y), x_test, y_test)


def test_the_interval_is_over_images_and_covers():
    generator = np.random.default_rng(0)
    images = generator.normal(0.3, 1, (200, 50)) + generator.normal(0, 1, (200, 50, 4)).mean(2)
    low, high = interval_over_images(images)
    assert 0.88 < ((low < 0.3) & (high > 0.3)).mean() <= 0.99
    width = 2 * 1.96 * (1.25 / 50) ** 0.5
    assert abs((high - low).mean() / width - 1) < 0.1


def test_layer_0_knows_the_place_and_the_last_pixel_and_no_more_than_counts_do():
    chain, generator = np.array([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.1, 0.4, 0.5]]), np.random.default_rng(0)
    values, vectors = np.linalg.eig(chain.T)
    stationary = vectors[:, values.real.argmax()].real
    stationary /= stationary.sum()
    pixels = [generator.choice(3, 240, p=stationary)]
    for _ in range(15):
        pixels.append((generator.random((240, 1)) > chain[pixels[-1]].cumsum(1)).sum(1).clip(max=2))
    tokens = np.stack(pixels, 1)
    names = ["current pixel", "next pixel", "row", "column"]
    table = bits_by_layer(network(n_embd=32, n_layer=1), tokens[:140], tokens[140:], targets=names, layers=[0],
                          n_states=6, progress=False).table.set_index("target")  # fmt: skip
    known = (table.bits / table.entropy)[["current pixel", "row", "column"]]
    assert (known > 0.97).all()
    entropy = -(stationary * np.log2(stationary)).sum()
    conditional = -(stationary[:, None] * chain * np.log2(chain)).sum()  # H(x_i | x_i-1), at every i
    told = entropy - conditional  # I(x_i; x_i-1)
    read = table.loc["next pixel"]
    assert read.low < told < read.high + 0.05 and read.log_loss > conditional - 0.05 and read.bits > 0.6 * told


def test_a_state_is_that_of_the_pixel_behind_it(tiny, tiny_folder):
    at = readouts._drawn([TOKENS, TOKENS], 5, 0)[0]
    assert at.min() >= 1 and at.max() <= 15 and (np.diff(at) > 0).all()
    with torch.no_grad():
        shifted = np.concatenate([np.full((6, 1), 8), TOKENS[:, :-1]], 1)
        h = tiny(torch.as_tensor(shifted), output_hidden_states=True).hidden_states[1]
    normed = (h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()).numpy()
    expected = np.concatenate([np.take_along_axis(normed, at[..., None], 1), normed.mean(1, keepdims=True)], 1)
    port = transformers().ImageGPTForCausalImageModeling.from_pretrained(tiny_folder).eval()
    for model in (tiny, port):
        with readouts.tqdm(disable=True) as bar:
            states = readouts._states(model, TOKENS, at, [1, 3], 4, "cpu", bar)
        assert states.shape == (6, 2, 6, 8)
        np.testing.assert_allclose(states[:, 0], expected, atol=1e-5)


def test_the_values_are_those_of_the_predicted_pixel():
    tokens, at = [np.arange(32).reshape(2, 16) % 20] * 2, [np.array([[1, 5], [4, 15]])] * 2
    labels, palette = [np.array([3, 7])] * 2, np.arange(60).reshape(20, 3)
    values = {name: readouts._values(name, tokens, at, labels, palette)[0].tolist() for name in TARGETS}
    assert values["current pixel"] == [[0, 4], [19, 10]] and values["next pixel"] == [[1, 5], [0, 11]]
    assert values["row"] == [[0, 1], [1, 3]] and values["column"] == [[1, 1], [0, 3]]
    assert values["mean colour"] == [[0, 0], [7, 7]]
    assert values["class"] == [[3, 3], [7, 7]] and values["class (mean state)"] == [[3], [7]]


def test_the_table_has_a_row_for_each_layer_and_target(tiny):
    tokens = np.random.default_rng(0).integers(0, 8, (40, 16))
    labels = (tokens.mean(1) > 3.5).astype(int)
    options = {"train_labels": labels[:25], "test_labels": labels[25:], "n_states": 3, "progress": False}
    measured = bits_by_layer(tiny, tokens[:25], tokens[25:], layers=[0, -1], **options)
    table = measured.table
    assert_means(measured, "bits")
    assert list(zip(table.layer, table.target, strict=True)) == [(layer, name) for layer in (0, 3) for name in TARGETS]
    np.testing.assert_allclose(table.bits, table.entropy - table.log_loss)
    assert table.low.le(table.bits).all() and table.bits.le(table.high).all() and table.n_images.eq(15).all()
    assert table.n_states.tolist() == 2 * (6 * [45] + [15]) and table.n_train.tolist() == 2 * (6 * [75] + [25])
    one = bits_by_layer(tiny.bfloat16(), tokens[:25], tokens[25:], layers=3, targets=["row"], **options).table
    assert one.bits[0] == pytest.approx(table.bits[9], abs=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["colour"]}, "target 'colour'; expected one of"),
        ({"targets": ["class"]}, "target 'class' needs train_labels and test_labels"),
        ({"layers": [4]}, "layer 4 at resid_pre"),
        ({"n_states": 16}, "n_states=16; expected 1 to 15"),
        ({"targets": "class", "train_labels": np.ones(6, int), "test_labels": np.arange(6)}, "'class': .* one value"),
        ({"palette": np.zeros((3, 3))}, "palette .3, 3.; expected the model's 8 colours"),
        ({"train_labels": np.zeros(3, int)}, r"labels int64 .3,.; expected integers .6,."),
        ({"train_tokens": TOKENS[:, :9]}, r"tokens .6, 9.; expected two or more whole images, .N, 16."),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line_before_any_work(tiny, options, words, monkeypatch):
    monkeypatch.setattr(type(tiny.transformer), "forward", None)
    with pytest.raises(ValueError, match=words):
        bits_by_layer(tiny, **{"train_tokens": TOKENS, "test_tokens": TOKENS, "progress": False} | options)


def test_what_is_not_causal_or_too_large_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(readouts, "ROOM", 1e3)
    monkeypatch.setattr(type(tiny.transformer), "forward", None)
    with pytest.raises(ValueError, match="states of 4 layers need 0.0 GB"):
        bits_by_layer(tiny, TOKENS, TOKENS, progress=False)
    bert = ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=2,
                                                         bidirectional=True, **PLAIN))  # fmt: skip
    with pytest.raises(ValueError, match="hidden pixels, not the next one; use a causal model"):
        bits_by_layer(bert, TOKENS, TOKENS)
    del tiny.processor
    with pytest.raises(ValueError, match="target 'mean colour' needs a palette"):
        lab.bits_by_layer(tiny, TOKENS, TOKENS, targets="mean colour")
