"""The solver against scikit-learn's, autograd and laws that any optimum obeys."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from igpt_lab.probing.solvers import lbfgs, objective
from igpt_lab.probing.solvers.logistic import Fits, fit_logistic, fit_path, fit_sklearn

CS = (1e-2, 1.0, 100.0)
TIGHT = {"tol": 1e-10, "dtype": torch.float64}


def rows(n: int, d: int, classes: int, *, seed: int = 0, apart: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features of very different scales and means, some of them telling of the class."""
    random = np.random.default_rng(seed)
    y = np.arange(n) % classes
    centres = random.standard_normal((classes, d)) * apart
    x = (random.standard_normal((n, d)) + centres[y]) @ random.standard_normal((d, d)) / d**0.5
    return x * np.logspace(-1, 1, d) + np.linspace(-5, 5, d), y


def theirs(x: np.ndarray, y: np.ndarray, C: float) -> LogisticRegression:
    solver = "newton-cholesky" if x.shape[1] * len(np.unique(y)) < 1500 else "lbfgs"
    return LogisticRegression(C=C, solver=solver, tol=1e-10, max_iter=100_000).fit(x, y)


def value_of(x: np.ndarray, y: np.ndarray, logits: np.ndarray, weights: np.ndarray, C: float) -> float:
    """As the docstring of the module has it, in numpy; `weights` of the features as x has them."""
    top = logits.max(1, keepdims=True)
    logs = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    return -logs[np.arange(len(y)), y].mean() + (weights**2).sum() / (2 * C * len(y))


CASES = {
    "two classes": rows(200, 6, 2),
    "ten classes": rows(400, 12, 10),
    "separable": rows(60, 5, 3, apart=20.0),
    "more features than rows": rows(30, 50, 3),
}
x, y = rows(300, 4, 3)
CASES["unbalanced"] = x[y * 97 <= np.arange(300)], y[y * 97 <= np.arange(300)]
x, y = rows(150, 5, 3)
CASES["constant and duplicated columns"] = np.hstack([x, x[:, :2], np.full((150, 1), 3.0)]), y


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("standardise", [True, False])
def test_objective_and_weights_are_those_of_scikit_learn(case, standardise):
    x, y = CASES[case]
    features = StandardScaler().fit_transform(x) if standardise else x
    fits = fit_logistic(x, y, CS, standardise=standardise, **TIGHT)
    assert fits.converged.all() and (fits.gradient <= 1e-10).all()
    for i, C in enumerate(CS):
        peer = theirs(features, y, C)
        logits = peer.decision_function(features)
        logits = np.stack([np.zeros_like(logits), logits], 1) if logits.ndim == 1 else logits
        assert fits.objective[0, i] == pytest.approx(value_of(features, y, logits, peer.coef_, C), rel=1e-8)
        deviations = x.std(0) if standardise else np.ones(x.shape[1])  # ours act on features as they were given
        assert fits.weights[0, i].T.numpy() * deviations == pytest.approx(peer.coef_, abs=1e-5)
        inner = features.mean(0) if not standardise else np.zeros(x.shape[1])  # ours act on centred features
        theirs_free = peer.intercept_ + peer.coef_ @ inner
        theirs_free -= theirs_free.mean() if len(theirs_free) > 1 else 0  # which the optimum leaves open
        assert fits.intercepts[0, i].numpy() == pytest.approx(theirs_free, abs=1e-4)
        ours = fits.logits(x)[i].softmax(-1).numpy()
        assert ours == pytest.approx(peer.predict_proba(features), abs=1e-5)
        assert (fits.predict(x)[i] == peer.predict(features)).mean() > 0.99


@pytest.mark.parametrize("case", ["two classes", "ten classes"])
def test_certificate_is_the_gradient_of_the_objective_by_autograd(case):
    x, y = CASES[case]
    fits = fit_logistic(x, y, [0.3], max_iter=3, dtype=torch.float64)
    assert not fits.converged.any() and (fits.iterations == 3).all()
    scaled = torch.tensor(StandardScaler().fit_transform(x))
    weights = (fits.weights[0, 0] * torch.tensor(x.std(0))[:, None]).requires_grad_()
    intercepts = fits.intercepts[0, 0].clone().requires_grad_()
    logits = scaled @ weights + intercepts
    logits = torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(y)) + (weights**2).sum() / (2 * 0.3 * len(y))
    loss.backward()
    assert fits.objective[0, 0] == pytest.approx(loss.item(), rel=1e-12)
    largest = max(weights.grad.abs().max().item(), intercepts.grad.abs().max().item())
    assert fits.gradient[0, 0] == pytest.approx(largest, rel=1e-9)


@pytest.mark.parametrize("n", [300, 20])
def test_all_at_once_equals_one_at_a_time(n):
    layers = np.stack([rows(n, 30, 4, seed=seed, apart=0.5)[0] for seed in range(3)])
    y = rows(n, 30, 4)[1]
    together = fit_logistic(layers, y, CS, **TIGHT)
    assert together.weights.shape == (3, 3, 30, 4) and together.converged.all()
    for b, layer in enumerate(layers):
        for s, C in enumerate(CS):
            alone = fit_logistic(layer, y, [C], **TIGHT)
            assert together.objective[b, s] == pytest.approx(alone.objective[0, 0], rel=1e-12)
            assert together.weights[b, s].numpy() == pytest.approx(alone.weights[0, 0].numpy(), abs=1e-6)
    own = fit_logistic(layers, y, [[1.0], [100.0], [0.01]], **TIGHT)  # a strength of its own for each layer
    picked = [together.objective[0, 1], together.objective[1, 2], together.objective[2, 0]]
    assert own.objective[:, 0] == pytest.approx(picked, rel=1e-12)


@pytest.mark.parametrize("case", ["two classes", "ten classes", "more features than rows"])
def test_a_path_of_strengths_has_the_fits_of_each_alone(case):
    x, y = CASES[case]
    for C, fits in zip(CS, fit_path(torch.tensor(x, dtype=torch.float32), y, CS, tol=1e-6), strict=True):
        alone = fit_logistic(x, y, [C], **TIGHT)
        assert fits.converged.all() and fits.Cs.tolist() == [[C]]
        assert fits.objective[0, 0] == pytest.approx(alone.objective[0, 0], rel=1e-5, abs=1e-6)
        assert fits.logits(x)[0].softmax(-1).numpy() == pytest.approx(alone.logits(x)[0].softmax(-1).numpy(), abs=2e-3)


def test_a_hessian_from_some_rows_and_in_blocks_leads_to_the_same_optimum(monkeypatch):
    x, y = rows(3000, 8, 6, apart=0.3)
    exact = fit_logistic(x, y, CS, **TIGHT)
    counts = []
    made = objective.Problem.factors
    monkeypatch.setattr(objective.Problem, "factors", lambda *arguments: counts.append(1) or made(*arguments))
    monkeypatch.setattr(objective.Problem, "price", lambda self: 2)
    for unknowns in (54, 27, 9):  # all classes in one block, three, one
        monkeypatch.setattr(objective, "UNKNOWNS", unknowns)
        counts.clear()
        fits = fit_logistic(x, y, CS, tol=1e-8, dtype=torch.float64)
        assert counts and fits.converged.all()
        assert fits.objective == pytest.approx(exact.objective, rel=1e-9)


def test_the_hessian_is_the_one_of_autograd():
    random = torch.Generator().manual_seed(0)
    z = torch.randn(12, 3, generator=random, dtype=torch.float64)
    weights = torch.randn(4, 3, generator=random, dtype=torch.float64)

    def loss(w):
        return torch.nn.functional.cross_entropy(z @ w.T, torch.arange(12) % 4, reduction="sum")

    whole = torch.autograd.functional.hessian(loss, weights)  # (4, 3, 4, 3)
    p = (z @ weights.T).softmax(1).T
    for size in (4, 2, 1):
        blocks = objective._hessian(z, p, torch.ones(12, dtype=torch.float64), size)
        for g, block in enumerate(blocks):
            own = slice(g * size, (g + 1) * size)
            assert block.numpy() == pytest.approx(whole[own, :, own].reshape(size * 3, size * 3).numpy())


def test_factors_of_what_rounding_has_made_indefinite():
    root = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    blocks = (root @ root.T)[None]  # rank 20 of 60, in float32
    blocks -= 1e-5 * blocks.diagonal(dim1=-2, dim2=-1).amax() * torch.eye(60)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(blocks)
    original = blocks.clone()
    factors = objective._factor(blocks)
    assert factors.isfinite().all()
    assert (factors @ factors.mT - original).abs().max() < 1e-3 * original.abs().max()


def test_a_sample_of_rows_estimates_the_hessian_of_all():
    random = torch.Generator().manual_seed(1)
    z = torch.randn(4000, 3, generator=random, dtype=torch.float64)
    p = (4 * torch.randn(4, 4000, generator=random, dtype=torch.float64)).softmax(0)
    whole = objective._hessian(z, p, torch.ones_like(p[0]), 4)
    part = objective._hessian(*objective._drawn(z, p, 1000), 4)
    assert (part - whole).abs().max() < 0.1 * whole.abs().max()
    few = z[::4], p[:, ::4], torch.full((1000,), 4.0, dtype=torch.float64)
    assert (part - whole).norm() < (objective._hessian(*few, 4) - whole).norm()  # rows that weigh more are drawn more


def test_the_direction_is_that_of_the_two_loop_recursion(monkeypatch):
    """Nocedal and Wright (2006), algorithm 7.4, for one fit at a time and without the pair that tells nothing."""
    monkeypatch.setattr(lbfgs, "MEMORY", 5)
    random = np.random.default_rng(0)
    root = random.standard_normal((6, 6))
    steps = random.standard_normal((2, 3, 17, 6))  # more than there is room for
    steps[0, 1, 14] = 0
    turns = steps @ (root @ root.T + np.eye(6))
    turns[1, 2, 15] *= -1  # no curvature along it
    gradient, guess = random.standard_normal((2, 3, 2, 3)), random.uniform(0.5, 2, (2, 3, 2, 3))
    slope, first_guess = torch.as_tensor(gradient), torch.as_tensor(guess)
    pairs = lbfgs.Pairs.of(slope)
    for place in range(17):
        pairs.add(torch.as_tensor(steps[:, :, place]), torch.as_tensor(turns[:, :, place]))
    direction = lbfgs.descent_direction(slope, pairs, first_guess, None).numpy()
    for fit in np.ndindex(2, 3):
        latest = [(s, y, 1 / (s @ y)) for s, y in zip(steps[fit][-5:], turns[fit][-5:], strict=True) if s @ y > 0]
        q, shares = gradient[fit].ravel(), []
        for s, y, rho in reversed(latest):
            shares.append(rho * (s @ q))
            q = q - shares[-1] * y
        r = guess[fit].ravel() * q
        for (s, y, rho), share in zip(latest, reversed(shares), strict=True):
            r = r + s * (share - rho * (y @ r))
        assert direction[fit].ravel() == pytest.approx(-r, rel=1e-9)
    blocks = [torch.diag_embed((1 / first_guess[:, j].flatten(1)) ** 0.5)[:, None] for j in range(3)]  # one block a fit
    assert lbfgs.descent_direction(slope, pairs, first_guess, blocks).numpy() == pytest.approx(direction, rel=1e-9)


def test_what_float32_cannot_reach_goes_on_in_float64():
    x, y = rows(200, 6, 3)
    short = fit_logistic(x.astype(np.float32), y, [100.0], tol=1e-10)
    assert short.converged.all()
    exact = fit_logistic(x.astype(np.float32), y, [100.0], **TIGHT)
    assert short.weights.numpy() == pytest.approx(exact.weights.numpy(), abs=1e-5)


def test_one_label_for_each_of_three_rows_and_large_means():
    x = np.eye(3) + 1e4
    fits = fit_logistic(x, [0, 1, 2], [1.0], standardise=False, **TIGHT)
    p = fits.logits(x)[0].softmax(-1)
    assert p.diagonal().numpy() == pytest.approx(np.full(3, p[0, 0].item())) and p[0, 0] > 0.5  # by symmetry
    assert fits.weights[0, 0].sum(0).numpy() == pytest.approx(np.zeros(3), abs=1e-8)


def test_what_the_passes_compute_stays_on_its_device():
    weights = torch.zeros(2, 3, 4, 6, device="meta")
    parts = [(torch.zeros(2, 5, 6, device="meta"), torch.zeros(5, dtype=torch.long, device="meta"))]
    value, gradient = objective.objective_and_gradient(parts, weights, torch.zeros(2, 3, 1, 6, device="meta"), 5)
    assert value.shape == (2, 3) and gradient.shape == weights.shape
    pairs = lbfgs.Pairs.of(weights)
    pairs.add(weights.flatten(2), weights.flatten(2))
    assert lbfgs.descent_direction(weights, pairs, weights, None).is_meta
    factors = [torch.zeros(2, 2, 12, 12, device="meta")] * 3
    assert lbfgs.descent_direction(weights, pairs, weights, factors).is_meta
    drawn = objective._drawn(torch.zeros(9, 6, device="meta"), torch.zeros(4, 9, device="meta"), 5)
    assert objective._hessian(*drawn, 2).is_meta


@pytest.mark.parametrize(
    "x, y, Cs, says",
    [
        (np.zeros((3, 2)), [0, 1], [1.0], "labels"),
        (np.full((2, 2), np.nan), [0, 1], [1.0], "not finite"),
        (np.zeros((2, 2)), [0, 1], [0.0], "C=0.0"),
        (np.zeros((2, 2)), [0, 0], [1.0], "two classes"),
        (np.zeros((2, 2)), [0, 2], [1.0], r"\[1, 0, 1\]"),
        (np.zeros((2, 2)), [0, -1], [1.0], "two classes"),
    ],
)
def test_errors_say_what_came(x, y, Cs, says):
    with pytest.raises(ValueError, match=says):
        fit_logistic(x, y, Cs)


def test_fits_are_frozen():
    with pytest.raises(AttributeError):
        fit_logistic(*rows(20, 2, 2), [1.0]).Cs = None
    assert Fits.__dataclass_params__.frozen


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("case", ["two classes", "ten classes", "constant and duplicated columns"])
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("max_iter", [7, 10_000])
def test_scikit_learn_is_left_as_it_is(case, standardise, max_iter):
    x, y = CASES[case]
    x = np.stack([x, x**2])
    fits = fit_sklearn(x, y, CS, standardise=standardise, max_iter=max_iter)
    for layer, i in np.ndindex(2, 3):
        features = StandardScaler().fit_transform(x[layer]) if standardise else x[layer]
        peer = LogisticRegression(C=CS[i], max_iter=max_iter).fit(features, y)
        assert fits.iterations[layer, i] == pytest.approx(peer.n_iter_[0], rel=0.1)  # it magnifies rounding
        ours = fits.logits(x[layer], layer)[i].softmax(-1).numpy()
        assert ours == pytest.approx(peer.predict_proba(features), abs=1e-4)
        logits = peer.decision_function(features)
        logits = np.stack([np.zeros_like(logits), logits], 1) if logits.ndim == 1 else logits
        assert fits.objective[layer, i] == pytest.approx(value_of(features, y, logits, peer.coef_, CS[i]), rel=1e-6)
    best = fit_logistic(x, y, CS, standardise=standardise)
    assert (fits.objective >= best.objective - 1e-6).all() and not fits.converged.all()  # its tolerance is another


def test_a_fit_that_begins_at_the_solution_stays_there():
    x, y = CASES["ten classes"]
    done = fit_logistic(x, y, [1.0])
    again = fit_logistic(x, y, [1.0], start=done)
    assert again.iterations.item() == 0 < done.iterations.item()
    torch.testing.assert_close(again.weights, done.weights, atol=1e-5, rtol=1e-5)
    few = fit_logistic(x[:300], y[:300], [0.1], start=done)  # other rows, other mean, another strength
    torch.testing.assert_close(few.weights, fit_logistic(x[:300], y[:300], [0.1]).weights, atol=1e-3, rtol=1e-2)


def test_a_device_without_float64_is_asked_for_none(monkeypatch):
    def double(self, *_):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    generator, y = np.random.default_rng(0), np.arange(600) % 2
    x = (generator.standard_normal((600, 4)) + y[:, None]).astype(np.float32)
    expected = fit_logistic(x, y, [0.1, 1.0])
    monkeypatch.setattr(objective, "exact_dtype", lambda device: torch.float32)
    monkeypatch.setattr(torch.Tensor, "double", double)
    fits = fit_logistic(x, y, [0.1, 1.0])
    torch.testing.assert_close(fits.weights.to(expected.weights), expected.weights, rtol=1e-3, atol=1e-3)
