"""The solver of the probes as an estimator of scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from igpt_lab.probing.solvers.logistic import fit_logistic


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Multinomial logistic regression as a scikit-learn estimator, on features that it standardises.

    The same optimum as `LogisticRegression(C=C)` on standardised features, or with `standardise=False` on those given,
    reached: the largest derivative is at most `tol`, or fit warns. After `fit`: `coef_` (K, D), or (1, D) of two
    classes, and `intercept_`, of features as given; `converged_`, `n_iter_`, and the certificate `objective_`,
    `gradient_` (see `logistic.Fits`).
    """

    def __init__(self, C: float = 1.0, *, standardise: bool = True, tol: float = 1e-6, max_iter: int = 1000):
        self.C, self.standardise = C, standardise
        self.tol, self.max_iter = tol, max_iter

    def fit(self, X: np.ndarray, y: np.ndarray) -> LinearProbe:
        """X (N, D), y (N,) of two classes or more."""
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        self.classes_, y = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"the data has one class, {self.classes_[0]!r}; a probe needs two or more")
        fits = fit_logistic(X, y, [self.C], standardise=self.standardise, tol=self.tol, max_iter=self.max_iter)
        weights = fits.weights[0, 0]
        self.coef_ = weights.T.numpy()
        self.intercept_ = (fits.intercepts[0, 0] - fits.mean[0] @ weights).numpy()
        self.converged_, self.n_iter_ = bool(fits.converged[0, 0]), int(fits.iterations[0, 0])
        self.objective_, self.gradient_ = float(fits.objective[0, 0]), float(fits.gradient[0, 0])
        if not self.converged_:
            warnings.warn(
                f"largest derivative {self.gradient_:.1e} after {self.n_iter_} iterations, above tol={self.tol}; "
                "raise max_iter or lower C", ConvergenceWarning, stacklevel=2,
            )  # fmt: skip
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """float64 (N, K), or of two classes the log-odds (N,) of the second."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        scores = X.astype(np.float64) @ self.coef_.T + self.intercept_
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Labels (N,) of X (N, D)."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """float64 (N, K)."""
        scores = torch.as_tensor(self.decision_function(X))
        return (torch.stack([torch.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores).softmax(1).numpy()
