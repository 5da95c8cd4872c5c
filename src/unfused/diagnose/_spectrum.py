"""Leading singular vectors, and how they lie among another matrix's: exactly, or as closely as a verdict needs.

How well a unit vector u agrees with the left singular vectors u0_i of W0 is a measure on the line: mass `(u' u0_i)^2` at
`s0_i^2`. Lanczos on `W0 W0'` from u gives its orthonormal polynomials p_0 .. p_m-1, and two facts about every mass:

    mass at x  <=  |u|^2 / sum_k p_k(x)^2          (the Christoffel function), and
    a Ritz vector that has converged is a singular vector, its weight the mass.

So a few dozen products decide `max_i |u' u0_i| < eps` without the singular vectors of W0. What stays undecided (vectors
among near-equal singular values) is looked up in the full decomposition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Alignment", "align", "align_exactly", "top_singular"]

MARGIN = 1.02  # between the points at which the bound is evaluated it can be a little higher
STAGES = (32, 64, 112, 160)  # products with W0 after which the verdict is tried
WINDOW = 0.1  # "near-equal": a base singular value within 10 % of the tuned one


class Alignment(NamedTuple):
    """Of each of k tuned vectors, (k,) each.

    `similarity`: the largest |cos| with a base vector, or where `bound` is True something above it that is below eps already;
    `match`: that base vector's singular value (nan for a bound); `rotation`: energy in the span of the base vectors whose
    singular value is within 10 % of its own.
    """

    similarity: torch.Tensor
    match: torch.Tensor
    rotation: torch.Tensor
    bound: torch.Tensor


def top_singular(
    matrix: torch.Tensor, k: int, seed: int = 0, tol: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k leading left singular vectors (d_out, k) and singular values (k,), by a randomised block Krylov space.

    The space grows until `|W W'u - s^2 u| <= tol s_1 s` for all k, and for a flat spectrum ends in the full decomposition.

    Examples
    --------
    >>> torch.manual_seed(0)
    <torch...>
    >>> w = torch.randn(60, 40)
    >>> bool(torch.allclose(top_singular(w, 3)[1], torch.linalg.svdvals(w)[:3], rtol=1e-4))
    True
    """
    q = min(matrix.shape)
    block = k + 8
    if 4 * block > q:
        return _exact_top(matrix, k)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], block, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q  # (d_out, columns)
    across = matrix.T @ basis  # W'Q
    for step in range(1, 40):
        if basis.shape[1] + block > q // 2:
            break
        fresh = matrix @ across[:, -block:]
        for _ in range(2):  # once is not enough in floating point
            fresh = fresh - basis @ (basis.T @ fresh)
            fresh = torch.linalg.qr(fresh).Q
        basis = torch.cat([basis, fresh], 1)
        across = torch.cat([across, matrix.T @ fresh], 1)
        if step % 3:
            continue
        square = across.double()  # squares of float32 would drown what is below 1e-3 of the first
        mix = torch.linalg.eigh(square.T @ square).eigenvectors.flip(1)[:, :k].to(matrix)
        vectors = basis @ mix
        vectors = vectors / vectors.norm(dim=0).clamp_min(1e-30)
        right = matrix.T @ vectors
        singular = right.norm(dim=0)
        residual = (matrix @ right - vectors * singular**2).norm(dim=0)
        if bool((residual <= tol * singular[0] * singular).all()):
            return vectors, singular
    return _exact_top(matrix, k)


def _exact_top(matrix: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :k].contiguous(), s[:k].contiguous()


def align_exactly(base: torch.Tensor, vectors: torch.Tensor, singular: torch.Tensor) -> Alignment:
    """By the full decomposition of `base` (d_out, d_in); see `Alignment`.

    Directions in which `base` is zero to rounding are none of its vectors.
    """
    u0, s0, _ = torch.linalg.svd(base, full_matrices=False)
    floor = s0[0] * max(base.shape) * torch.finfo(base.dtype).eps if len(s0) else 0.0
    cosine = (vectors.T @ u0).abs() * (s0 > floor)  # (k, q)
    best = cosine.max(dim=1)
    near = (s0 - singular[:, None]).abs() <= WINDOW * singular[:, None]
    return Alignment(
        best.values.clamp_max(1.0),
        s0[best.indices],
        (cosine.square() * near).sum(1).clamp_max(1.0),
        torch.zeros(len(best.values), dtype=torch.bool),
    )


def align(base: torch.Tensor, vectors: torch.Tensor, singular: torch.Tensor, eps: float) -> Alignment:
    """As `align_exactly` on the question whether a similarity is below `eps`, by Lanczos; see the module.

    Parameters
    ----------
    base : Tensor (d_out, d_in), float32 or float64
    vectors : Tensor (d_out, k)
        Of length 1.
    singular : Tensor (k,)
        The tuned singular values, for `rotation`.
    eps : float
    """
    k = vectors.shape[1]
    small, starts = base, vectors
    if base.shape[0] > base.shape[1]:  # what lies outside the column space agrees with no vector of it
        q, small = torch.linalg.qr(base)
        starts = q.T @ vectors
    numbers = [torch.zeros(k, dtype=torch.float64) for _ in range(3)]
    found = Alignment(numbers[0], numbers[1], numbers[2], torch.zeros(k, dtype=torch.bool))
    open_ = torch.arange(k)
    lanczos = _Lanczos(small, starts)
    for stage in STAGES:
        if stage >= small.shape[0] or not len(open_):
            break
        lanczos.run(stage)
        decided = []
        for place, j in enumerate(open_.tolist()):
            verdict = _decide(*lanczos.coefficients(place), float(singular[j]), eps)
            if verdict is not None:
                for column, value in zip(found, verdict, strict=True):
                    column[j] = value
                decided.append(place)
        left = [place for place in range(len(open_)) if place not in decided]
        open_ = open_[left]
        lanczos.keep(left)
    if len(open_):
        exact = align_exactly(base, vectors[:, open_], singular[open_])
        for column, values in zip(found, exact, strict=True):
            column[open_] = values.to(column)
    return found


class _Lanczos:
    """`W W'` from several starts at once, each with its own space, fully reorthogonalised."""

    def __init__(self, matrix: torch.Tensor, starts: torch.Tensor):
        self.matrix = matrix
        self.norm = starts.norm(dim=0)
        self.basis = (starts / self.norm.clamp_min(1e-30)).T[:, None]  # (starts, steps, d)
        self.diagonal = self.basis.new_zeros(len(self.basis), 0, dtype=torch.float64)
        self.beside = self.diagonal.clone()

    def run(self, steps: int) -> None:
        while self.diagonal.shape[1] < steps:
            q = self.basis[:, -1]  # (starts, d)
            r = (q @ self.matrix) @ self.matrix.T
            alpha = (q * r).sum(1)
            for _ in range(2):
                inside = torch.einsum("smd,sd->sm", self.basis, r)
                r = r - torch.einsum("smd,sm->sd", self.basis, inside)
            beta = r.norm(dim=1)
            self.diagonal = torch.cat([self.diagonal, alpha[:, None].double()], 1)
            self.beside = torch.cat([self.beside, beta[:, None].double()], 1)
            self.basis = torch.cat([self.basis, (r / beta.clamp_min(1e-30)[:, None])[:, None]], 1)

    def keep(self, places: list[int]) -> None:
        self.norm, self.basis = self.norm[places], self.basis[places]
        self.diagonal, self.beside = self.diagonal[places], self.beside[places]

    def coefficients(self, place: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        """|u|^2, the diagonal (m,) and what is beside it (m,), up to where the space is exhausted."""
        diagonal, beside = self.diagonal[place].cpu(), self.beside[place].cpu()
        tiny = beside <= 1e-6 * diagonal.abs().max().clamp_min(1e-30)
        end = int(tiny.nonzero()[0]) + 1 if bool(tiny.any()) else len(diagonal)
        return float(self.norm[place]) ** 2, diagonal[:end], beside[:end]


def _decide(
    mass: float, diagonal: torch.Tensor, beside: torch.Tensor, singular: float, eps: float
) -> tuple[float, float, float, bool] | None:
    """Similarity, match, rotation and whether the first is a bound; None where the space is too small to say."""
    m = len(diagonal)
    tridiagonal = torch.diag(diagonal) + torch.diag(beside[:-1], 1) + torch.diag(beside[:-1], -1)
    nodes, mix = torch.linalg.eigh(tridiagonal)
    weights = mass * mix[0].square()
    near = (nodes.clamp_min(0).sqrt() - singular).abs() <= WINDOW * singular
    rotation = min(1.0, float(weights[near].sum()))
    if mass < (eps / MARGIN) ** 2:  # hardly anything of u lies in the column space
        return min(1.0, mass**0.5), float("nan"), rotation, True

    residual = beside[-1] * mix[-1].abs()
    gaps = torch.full((m,), float("inf"), dtype=torch.float64)
    if m > 1:
        apart = nodes.diff()
        gaps[:-1], gaps[1:] = apart, torch.minimum(gaps[1:], apart)
    # Nodes at 0 may stand for directions that W0 does not have.
    converged = (residual <= 1e-3 * gaps) & (residual <= 1e-5 * nodes) & (nodes > 1e-10 * nodes[-1])
    seen = torch.where(converged, weights, 0.0)
    best = int(seen.argmax())
    similarity = float(seen[best].clamp(0, 1).sqrt())
    if similarity >= eps * 1.001 and float(seen[best]) >= float(weights.max()):
        return similarity, float(nodes[best].sqrt()), rotation, False

    steps = torch.arange(16, dtype=torch.float64) / 16
    grid = torch.cat([(nodes[:-1, None] + nodes.diff()[:, None] * steps).flatten(), nodes[-1:]])
    before, now = torch.zeros_like(grid), torch.ones_like(grid)
    total = torch.ones_like(grid)
    for step in range(m - 1):
        last = beside[step - 1] if step else 0.0
        before, now = now, ((grid - diagonal[step]) * now - last * before) / beside[step]
        total = total + now.square()
    total = total.nan_to_num(float("inf"))  # far from all nodes the polynomials overflow
    bound = MARGIN * (mass / float(total.min())) ** 0.5
    if bound < eps:
        return bound, float("nan"), rotation, True
    return None
