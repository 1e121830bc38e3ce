"""Solvers of the probes: penalised logistic regression by L-BFGS, and heads trained by SGD."""
