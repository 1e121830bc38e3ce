"""L-BFGS for many fits at once: all that still run share each pass over the rows.

The method is that of Nocedal and Wright (Numerical Optimization, 2006, chapter 7), its matrix in the compact form of
Byrd, Nocedal and Schnabel (1994). Its first guess of the Hessian is the diagonal at the start. Once the passes have
cost as much as a Hessian, one is made from some of the rows, and its Cholesky factors are the next guess.

Shapes: B layers, S strengths that still run, M vectors of weights with R + 1 unknowns each, n = M (R + 1) of them flat,
and m pairs that are remembered. Fits of one strength stop together: a column goes when all of its layers are done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from igpt_lab.core.side_by_side import check_wanted
from igpt_lab.probing.solvers.objective import Problem

MEMORY = 20  # pairs that are remembered
IDLE = 10  # steps with no gain in value nor slope, after which precision is at its end
DECREASE = 1e-4  # the share of the promised decrease that a step must keep (Nocedal and Wright, eq. 3.4 and below it)


def minimise(
    problem: Problem,
    start: Tensor,
    todo: np.ndarray,
    tol: float | Tensor,
    max_iter: int,
    factors: list[Tensor] | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Weights (B, S, M, R + 1) from `start`, and the steps int (B, S) that each fit took.

    Only fits of `todo`, bool (B, S), move. One is done when no derivative is above `tol`, one number or (B, S), or at
    the end of its precision (`IDLE`). After `max_iter` passes all are left as they are. `factors` of all strengths, as
    of `Problem.factors` near the start, are the first guess of the Hessian.
    """
    result, taken = start.clone(), torch.zeros(todo.shape, dtype=torch.long, device=start.device)
    state = _begin(problem, start, torch.as_tensor(todo, device=start.device))
    bounds = torch.as_tensor(tol, dtype=start.dtype, device=start.device).expand(todo.shape)
    if factors is not None:
        state.factors = [factors[column] for column in state.columns.tolist()]
    passes = 0  # since the last Hessian
    for count in range(max_iter + 1):
        state.stop_finished(problem, bounds[:, state.columns])
        going = state.active.any(0).nonzero()[:, 0]
        if not len(going) or count == max_iter:
            break
        if len(going) < len(state.columns):
            result[:, state.columns] = state.weights
            state = state.only(going)
        if passes >= problem.price() and not problem.apart:
            state.factors, passes = problem.factors(state.weights, state.columns), 0
        taken[:, state.columns] += state.active
        check_wanted()
        state.step(problem)
        passes += 1
    result[:, state.columns] = state.weights
    return result, taken.cpu().numpy()


@dataclass
class Pairs:
    """What the last `MEMORY` steps tell: changes of the weights, of the gradient, and products of the two.

    The arrays have room for twice as many, so that they move only once in `MEMORY` steps. A step of zeros, along which
    the curvature is not above 0, tells nothing.
    """

    steps: Tensor  # (B, S, 2 MEMORY, n): changes of the weights, the latest last
    turns: Tensor  # (B, S, 2 MEMORY, n): changes of the gradient along them
    upper: Tensor  # (B, S, 2 MEMORY, 2 MEMORY): steps times turns, the triangle; 1 on its diagonal for a step of zeros
    end: int = 0  # of what the arrays hold

    @classmethod
    def of(cls, weights: Tensor) -> Pairs:
        """Without a step yet, for weights (B, S, M, R + 1)."""
        b, s, m, r = weights.shape
        steps, turns = weights.new_zeros(2, b, s, 2 * MEMORY, m * r)
        return cls(steps, turns, weights.new_zeros(b, s, 2 * MEMORY, 2 * MEMORY))

    def only(self, going: Tensor) -> Pairs:
        """Those of the columns at the places `going`."""
        return replace(self, steps=self.steps[:, going], turns=self.turns[:, going], upper=self.upper[:, going])

    def latest(self) -> tuple[Tensor, Tensor, Tensor]:
        """`steps` and `turns` (B, S, m, n) and `upper` (B, S, m, m)."""
        last = slice(max(0, self.end - MEMORY), self.end)
        return self.steps[:, :, last], self.turns[:, :, last], self.upper[:, :, last, last]

    def add(self, step: Tensor, turn: Tensor) -> None:
        """Changes (B, S, n), taken as zeros where the curvature along them is not above 0.

        That is the condition under which the matrix stays positive definite (Nocedal and Wright, eq. 6.7).
        """
        if self.end == 2 * MEMORY:
            kept, self.end = slice(MEMORY + 1, None), MEMORY - 1
            self.steps[:, :, : self.end] = self.steps[:, :, kept]
            self.turns[:, :, : self.end] = self.turns[:, :, kept]
            self.upper[:, :, : self.end, : self.end] = self.upper[:, :, kept, kept]
        place, self.end = self.end, self.end + 1
        bent = (step * turn).sum(2, keepdim=True) > 0
        self.steps[:, :, place] = torch.where(bent, step, 0)
        self.turns[:, :, place] = torch.where(bent, turn, 0)
        steps, turns, upper = self.latest()
        products = (steps @ turns[:, :, -1, :, None])[..., 0]
        products[..., -1] += products[..., -1] == 0
        upper[..., -1] = products


@dataclass
class _State:
    """The state of the fits whose strengths are `columns`, int64 (S,), among those of the problem."""

    columns: Tensor
    active: Tensor  # bool (B, S): not done
    weights: Tensor  # (B, S, M, R + 1), as are `gradient` and `guess`
    value: Tensor  # objective (B, S)
    gradient: Tensor
    guess: Tensor  # of the inverse Hessian, its diagonal
    length: Tensor  # (B, S), of the step to try next
    idle: Tensor  # (B, S), steps since the last gain in value or slope
    lowest: Tensor  # (B, S), the least that the norm of the gradient has been
    pairs: Pairs
    factors: list[Tensor] | None = None  # in place of `guess`, for each column (B, G, U, U): see `Problem.factors`

    def only(self, going: Tensor) -> _State:
        """The columns at the places `going`."""
        return _State(
            self.columns[going],
            self.active[:, going],
            self.weights[:, going],
            self.value[:, going],
            self.gradient[:, going],
            self.guess[:, going],
            self.length[:, going],
            self.idle[:, going],
            self.lowest[:, going],
            self.pairs.only(going),
            None if self.factors is None else [self.factors[place] for place in going.tolist()],
        )

    def stop_finished(self, problem: Problem, tol: Tensor) -> None:
        """Note which fits are done: no derivative is above `tol` (B, S), or precision is at its end.

        The largest derivative, which takes a product of matrices, is not below their root mean square.
        """
        norm = torch.linalg.vector_norm(self.gradient, dim=(2, 3))
        self.idle = torch.where(norm < self.lowest, 0, self.idle)
        self.lowest = torch.minimum(norm, self.lowest)
        self.active = self.active & (self.idle < IDLE)
        near = norm <= tol * math.sqrt(problem.derivatives)
        if (self.active & near).any():
            self.active = self.active & (problem.largest_derivative(self.gradient) > tol)

    def step(self, problem: Problem) -> None:
        """Try one step of each fit, in one pass over the rows; one that gains too little is tried shorter next time.

        The line search is backtracking to sufficient decrease (Nocedal and Wright, algorithm 3.1 and eq. 3.4), here
        with an allowance for rounding.
        """
        direction = descent_direction(self.gradient, self.pairs, self.guess, self.factors)
        slope = (self.gradient * direction).sum((2, 3))
        weights = self.weights + self.length[..., None, None] * direction
        value, gradient = problem.evaluate(weights, self.columns)
        rise = value - self.value - self.length * slope
        rounding = 4 * torch.finfo(weights.dtype).eps * self.value
        better = self.active & (value <= self.value + DECREASE * self.length * slope + rounding)
        self.idle = torch.where(value < self.value - rounding, 0, self.idle + 1)
        moved = better[..., None, None]
        self.pairs.add(
            torch.where(moved, weights - self.weights, 0).flatten(2),
            torch.where(moved, gradient - self.gradient, 0).flatten(2),
        )
        self.weights = torch.where(moved, weights, self.weights)
        self.gradient = torch.where(moved, gradient, self.gradient)
        self.value = torch.where(better, value, self.value)
        self.length = torch.where(better, 1.0, _shorter(self.length, slope, rise))


def _begin(problem: Problem, start: Tensor, todo: Tensor) -> _State:
    """The columns of which any fit is `todo`, bool (B, S), at `start` and without memory."""
    columns = todo.any(0).nonzero()[:, 0]
    weights = start[:, columns]
    value, gradient = problem.evaluate(weights, columns)
    return _State(
        columns,
        todo[:, columns],
        weights,
        value,
        gradient,
        guess=1 / problem.curvature()[:, columns],
        length=torch.ones_like(value),
        idle=torch.zeros_like(value),
        lowest=torch.full_like(value, math.inf),
        pairs=Pairs.of(weights),
    )


def _shorter(length: Tensor, slope: Tensor, rise: Tensor) -> Tensor:
    """Where the parabola through both values and the slope is least, 0.1 to 0.5 times the length (B, S) that failed.

    Nocedal and Wright, eq. 3.58; the bounds are those of Dennis and Schnabel (1983, algorithm A6.3.1). `rise` is what
    the value at that length is above the tangent.
    """
    shorter = (-slope * length / (2 * rise)).clamp(0.1, 0.5) * length
    return shorter.nan_to_num(0)


def descent_direction(gradient: Tensor, pairs: Pairs, guess: Tensor, factors: list[Tensor] | None) -> Tensor:
    """Minus the inverse Hessian that the pairs tell of, times the gradient.

    (B, S, M, R + 1), as the gradient. The same as the two-loop recursion (Nocedal and Wright, algorithm 7.4) in another
    order of sums, by products of matrices: the compact form of the inverse (Byrd, Nocedal and Schnabel, 1994, theorem
    2.2), of which `Pairs.upper` is R.
    """
    down = -gradient.flatten(2)[..., None]
    if not pairs.end:
        return _first_guess(down, guess, factors).view_as(gradient)
    steps, turns, upper = pairs.latest()
    bend = upper.diagonal(dim1=-2, dim2=-1)
    along = torch.linalg.solve_triangular(upper, steps @ down, upper=True)
    ahead = _first_guess(down - turns.mT @ along, guess, factors)
    back = torch.linalg.solve_triangular(upper.mT, bend[..., None] * along - turns @ ahead, upper=False)
    return (ahead + steps.mT @ back).view_as(gradient)


def _first_guess(x: Tensor, guess: Tensor, factors: list[Tensor] | None) -> Tensor:
    """The first guess of the inverse Hessian times x (B, S, n, 1): the diagonal `guess`, or by `factors` of blocks."""
    if factors is None:
        return x * guess.flatten(2)[..., None]
    columns = []
    for place, blocks in enumerate(factors):
        columns.append(torch.cholesky_solve(x[:, place].view(*blocks.shape[:3], 1), blocks))
    return torch.stack(columns, 1).view_as(x)
