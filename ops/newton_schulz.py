"""Orthogonalisation of a matrix by Newton-Schulz iterations, which need only matmuls.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with its
coefficients: they raise small singular values fastest, and end between 0.7 and 1.2 instead of at 1.
"""

import torch
from torch import Tensor

from ops.matmul import matmul_dtype

_A, _B, _C = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7  # of a matrix that is not all zeros


def orthogonalise(matrix: Tensor, num_steps: int) -> Tensor:
    """Return `U V^T` of a matrix `U S V^T`, but with singular values near 1 instead of all 1.

    `[m, n]`. Computed in the dtype in which this device multiplies, without rounding in between
    where that is wider (see [Note: widening]).
    """
    x = matrix.to(matmul_dtype(matrix))
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:  # x x^T is then smaller
        x = x.t()
    # In float64, see `_norms` in parallel/gradients.py.
    x = x / torch.linalg.vector_norm(x, dtype=torch.float64).clamp(min=_SMALLEST_NORM)
    for _ in range(num_steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.t() if is_tall else x).to(matrix.dtype)


def orthogonalise_flops(num_rows: int, num_columns: int, num_steps: int) -> float:
    """Floating-point operations of `orthogonalise`."""
    m, n = sorted((num_rows, num_columns))
    return num_steps * 2.0 * m * m * (2 * n + m)
