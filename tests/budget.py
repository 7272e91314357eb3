"""The error budget: what rounding in fp32 must cost on these very rows, on any machine; one rounding in low precision.

How far a right answer in fp32 is off depends on the row: where teacher and student are near, or a gradient is a small
difference of large numbers, every rounding before it is magnified. How far it is off on one machine depends on that
machine's BLAS and vector width too, so eager PyTorch's own error is no measure that travels. Instead the float64 oracle
is evaluated with random errors of the size that the unavoidable roundings have, and the budget is :data:`LIMIT` times
what that costs:

- a dot product of K terms, summed in blocks of at most :data:`BLOCK`, rounds each partial sum: sqrt(K / 6) units of the
  norm of its products;
- a logit's distance to the row's largest, and its exponential, round once or twice;
- the rows' normalisers, whose difference is part of a difficulty, round in units of their own size;
- products of probabilities, which the gradient sums up and subtracts, round in units of the probabilities, and so do
  the terms of the loss.

All of that is computed in float64, so it is the same on every CPU to many digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.reference import reference_kd_loss

from .problems import Problem, amplified, gradients, has_powers, oracle64, relative

UNIT = 2.0**-24
BLOCK = 512
# Two draws of one size differ by chance: rows were seen to take up to 2.6 times the cost.
LIMIT = 4.0
# One rounding of the result to its dtype (and of dlogits to the GEMM's); fp32: a few units in the last place.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
LOSS_ROUNDING = 1e-6
LONG_ROW = 10_000  # one draw is an average over many entries


def check_budget(p: Problem, objective, out: fk.KDOutput, grads: list[Tensor]) -> None:
    expected, expected_grads = oracle64(p, objective)
    cost = rounding_cost(p, objective)
    dtype = p.hidden.dtype
    assert relative(out.loss, expected.loss) <= max(LOSS_ROUNDING, LIMIT * cost["loss"])
    for name, actual, ref in zip(("dH", "dW", "db"), grads, expected_grads, strict=False):
        error, budget = relative(actual, ref), max(ROUNDING[dtype], LIMIT * cost[name])
        assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.2e}"
    if dtype == torch.float32:
        assert torch.equal(out.is_hard.cpu(), expected.is_hard.cpu())
        assert relative(out.difficulty, expected.difficulty) <= max(LOSS_ROUNDING, LIMIT * cost["difficulty"])


def mean_loss_budget(z: Tensor, z_t: Tensor, losses: Tensor) -> float:
    """Relative, of the mean of (N,) losses from these logits, all float64."""
    sizes = losses + (z.softmax(-1) + z_t.softmax(-1)).norm(dim=-1)
    return max(4 * LOSS_ROUNDING, LIMIT * UNIT * float(sizes.norm() / losses.sum()))


def rounding_cost(p: Problem, objective) -> dict[str, float]:
    """Relative errors, root mean square over draws, of tokens' losses and difficulties and of the mean's gradients."""
    exact = _rounded(p, objective, 0.0, torch.Generator())
    squares, draws = dict.fromkeys(exact, 0.0), 1 if p.weight.shape[0] > LONG_ROW else 3
    for seed in range(draws):
        drawn = _rounded(p, objective, UNIT, torch.Generator().manual_seed(seed))
        for name in exact:
            squares[name] += relative(drawn[name], exact[name]) ** 2 / draws
    return {name: square**0.5 for name, square in squares.items()}


def _rounded(p: Problem, objective, unit: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Losses and gradients of the oracle with errors of ``unit`` times what is rounded."""

    def off(x: Tensor, size: Tensor | float) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        return x + unit * size * noise

    def product(a: Tensor, b: Tensor) -> Tensor:
        sums = (min(a.shape[1], BLOCK) / 6) ** 0.5
        return off(a @ b, sums * (a**2 @ b**2).sqrt())

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        z = product(hidden, weight.T) if bias is None else product(hidden, weight.T) + bias
        return off(z, 2 + (z - z.amax(-1, keepdim=True)).abs() / 3)

    valid = p.labels != -100
    hidden, weight, *bias = (x.detach().double() for x in p.leaves)
    z = logits(hidden[valid], weight, *bias).requires_grad_()
    z_t = logits(p.hidden_t.double()[valid], p.weight_t.double())
    losses, difficulty, *_ = reference_kd_loss(z, z_t, p.labels[valid], objective, reduction="none")
    (dz,) = gradients(losses.mean(), [z])
    probabilities = z.detach().softmax(-1) + z_t.softmax(-1)
    losses = off(losses.detach(), losses.detach() + amplified(objective) * probabilities.norm(dim=-1))
    # Powers are exponentials of logarithms, which are rounded in units of their own size.
    size = probabilities * (1 + (z.detach().log_softmax(-1).abs() if has_powers(objective) else 0.0))
    dz = off(dz, size / len(z))
    return {
        "loss": losses,
        "difficulty": off(difficulty, (z.detach().logsumexp(-1).abs() + z_t.logsumexp(-1).abs()) / 2),
        "dH": product(dz, weight),
        "dW": product(dz.T, hidden[valid]),
        "db": product(dz.T, torch.ones_like(dz[:, :1])),
    }
