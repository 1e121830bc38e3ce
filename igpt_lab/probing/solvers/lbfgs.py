"""L-BFGS for many fits at once: all that still run share each pass over the rows.

The method is that of Nocedal and Wright (Numerical Optimization, 2006, chapter 7), its matrix in the compact form of
Byrd, Nocedal and Schnabel (1994). Its first guess of the Hessian is the diagonal at the start. Once the passes have
cost as much as a Hessian, one is made from some of the rows, and its Cholesky factors are the next guess.

Shapes: B layers, S strengths that still run, M vectors of weights with R + 1 unknowns each, n = M (R + 1) of them flat,
and m pairs that are remembered. Fits of one strength stop together: a column goes when all of its layers are done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
        state.stop_finished(problem.largest_derivative(state.gradient), bounds[:, state.columns])
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
    lowest: Tensor  # (B, S), the least that the largest derivative has been
    steps: Tensor  # (B, S, m, n): changes of the weights, the latest last; zeros tell nothing
    turns: Tensor  # (B, S, m, n): changes of the gradient along them
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
            self.steps[:, going],
            self.turns[:, going],
            None if self.factors is None else [self.factors[place] for place in going.tolist()],
        )

    def stop_finished(self, largest: Tensor, tol: Tensor) -> None:
        """Note which fits are done, by their largest derivative (B, S) and what it may be (B, S)."""
        self.idle = torch.where(largest < self.lowest, 0, self.idle)
        self.lowest = torch.minimum(largest, self.lowest)
        self.active = self.active & (largest > tol) & (self.idle < IDLE)

    def step(self, problem: Problem) -> None:
        """Try one step of each fit, in one pass over the rows; one that gains too little is tried shorter next time.

        The line search is backtracking to sufficient decrease (Nocedal and Wright, algorithm 3.1 and eq. 3.4), here
        with an allowance for rounding.
        """
        direction = descent_direction(self.gradient, self.steps, self.turns, self.guess, self.factors)
        slope = (self.gradient * direction).sum((2, 3))
        weights = self.weights + self.length[..., None, None] * direction
        value, gradient = problem.evaluate(weights, self.columns)
        rise = value - self.value - self.length * slope
        rounding = 4 * torch.finfo(weights.dtype).eps * self.value
        better = self.active & (value <= self.value + DECREASE * self.length * slope + rounding)
        self.idle = torch.where(value < self.value - rounding, 0, self.idle + 1)
        moved = better[..., None, None]
        self.remember(
            torch.where(moved, weights - self.weights, 0).flatten(2),
            torch.where(moved, gradient - self.gradient, 0).flatten(2),
        )
        self.weights = torch.where(moved, weights, self.weights)
        self.gradient = torch.where(moved, gradient, self.gradient)
        self.value = torch.where(better, value, self.value)
        self.length = torch.where(better, 1.0, _shorter(self.length, slope, rise))

    def remember(self, step: Tensor, turn: Tensor) -> None:
        """Add changes (B, S, n) of weights and gradient, as zeros where the curvature along them is not above 0.

        That is the condition under which the matrix stays positive definite (Nocedal and Wright, eq. 6.7).
        """
        bent = (step * turn).sum(2, keepdim=True) > 0
        self.steps = torch.cat([self.steps, torch.where(bent, step, 0)[:, :, None]], 2)[:, :, -MEMORY:]
        self.turns = torch.cat([self.turns, torch.where(bent, turn, 0)[:, :, None]], 2)[:, :, -MEMORY:]


def _begin(problem: Problem, start: Tensor, todo: Tensor) -> _State:
    """The columns of which any fit is `todo`, bool (B, S), at `start` and without memory."""
    columns = todo.any(0).nonzero()[:, 0]
    weights = start[:, columns]
    value, gradient = problem.evaluate(weights, columns)
    nothing = weights.flatten(2)[:, :, None][:, :, :0]
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
        steps=nothing,
        turns=nothing,
    )


def _shorter(length: Tensor, slope: Tensor, rise: Tensor) -> Tensor:
    """Where the parabola through both values and the slope is least, 0.1 to 0.5 times the length (B, S) that failed.

    Nocedal and Wright, eq. 3.58; the bounds are those of Dennis and Schnabel (1983, algorithm A6.3.1). `rise` is what
    the value at that length is above the tangent.
    """
    shorter = (-slope * length / (2 * rise)).clamp(0.1, 0.5) * length
    return shorter.nan_to_num(0)


def descent_direction(
    gradient: Tensor, steps: Tensor, turns: Tensor, guess: Tensor, factors: list[Tensor] | None
) -> Tensor:
    """Minus the inverse Hessian that the last `steps` and `turns` (B, S, m, n) tell of, times the gradient.

    (B, S, M, R + 1), as the gradient. The same as the two-loop recursion (Nocedal and Wright, algorithm 7.4) in another
    order of sums, by products of matrices: the compact form of the inverse (Byrd, Nocedal and Schnabel, 1994, theorem
    2.2). `upper` is the triangle of their R, with 1 on the diagonal for a step of zeros.
    """
    down = -gradient.flatten(2)[..., None]
    if not steps.shape[2]:
        return _first_guess(down, guess, factors).view_as(gradient)
    products = steps @ turns.mT
    bend = products.diagonal(dim1=-2, dim2=-1)
    upper = products.triu() + torch.diag_embed((bend == 0).to(bend.dtype))
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
