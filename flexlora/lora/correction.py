"""Corrects a mean of factors towards the mean of products, by ridge regression and without forming the latter."""

# torch.linalg carries no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lora.factors import LoraFactors
from flexlora.lora.linalg import thin_svd
from flexlora.lora.operator import Operator
from flexlora.lora.product import ProductSum


def b_correction(
    total: ProductSum, divisor: float, mean: LoraFactors, ridge: float
) -> Float[Tensor, "out_features rank"]:
    """Return the ``dB`` that brings ``scaling (B + dB) A`` nearest to ``P = total / divisor``.

    It minimises ``||P / scaling - (B + dB) A||_F^2 + ridge ||dB||_F^2``, whose solution is

        dB = (P / scaling - B A) A^T (A A^T + ridge I)^-1

    ``P`` is only multiplied with ``rank`` columns. With ``A = Q diag(d) Vh`` the last two matrices are
    ``Vh^T diag(d / (d^2 + ridge)) Q^T``, which keeps the digits that ``A A^T`` would lose and has a limit, the
    pseudo-inverse, where ``ridge`` is 0.

    Args:
        total: The weighted sum of products.
        divisor: The sum of the weights.
        mean: Factors in float64, ``B`` and ``A`` above.
        ridge: At least 0.
    """
    Q, d, Vh = thin_svd(mean.A)
    smallest = torch.finfo(torch.float64).eps * max(mean.A.shape) * d.max()
    damped = torch.where(d > smallest, d / (d.square() + ridge), 0.0)
    inverse = (Vh.T * damped) @ Q.T
    operator = Operator(*mean.shape, total.terms, total.dense, mean.A.device, total.magnitude)
    return operator.apply(inverse) / (divisor * mean.scaling) - mean.B @ (mean.A @ inverse)
