r"""Every invertible linear map as a short stack of couplings with a fixed partition.

A matrix of even size with positive determinant is a product of alternating
:class:`~gauss_flows.theory.linear_coupling.LinearCoupling` factors. Four routes:

================  =======  =====================================================
function          factors  for
================  =======  =====================================================
`factor_lu`       <= 26    the route of the paper (which counts 47), made shorter
`factor_minimal`  5 or 6   the least number; usable to about 16 coordinates
`factor_stable`   <= 15    rotations (permutations: 9), with factors of norm 3.3
`factor_svd`      <= 31    anything: two rotations and the singular values
================  =======  =====================================================

A positive determinant is needed because scales are positive. Source: Koehler, Mehta &
Risteski (2021) for the question and the first route; the others, and all counts, are
proved in chapter 12 of the book.
"""

import itertools
import math

import numpy as np
import scipy.linalg as sl
from jaxtyping import Float

from ._signed_permutations import factor_signed_permutation
from .linear_coupling import LinearCoupling, merged, product

Matrix = Float[np.ndarray, "n n"]
Half = Float[np.ndarray, "d d"]

_GOOD = 1e-13  # relative error of a product that is not tried to be made smaller
_ATTEMPTS = 16  # bases tried by factor_minimal; the best product is kept
_SINGULAR = 1e-8  # a corner with a smaller reciprocal condition number is not inverted


def factor_lu(matrix: Matrix) -> list[LinearCoupling]:
    """At most 26 factors, by the LU decomposition with partial pivoting.

    A signed permutation in at most 19 factors, and four for each triangular matrix.

    Args:
        matrix: An invertible matrix of even size n >= 2, with positive determinant.

    Returns:
        Factors whose :func:`~gauss_flows.theory.linear_coupling.product` is the matrix.

    Raises:
        ValueError: If the size is odd, an entry not finite, or the determinant not
            positive.
    """
    matrix = _checked(matrix)
    order, lower, upper = map(np.asarray, sl.lu(matrix))
    signs = np.sign(np.diag(upper))
    return merged(
        [
            *factor_signed_permutation(order * signs),
            *_lower_triangular(signs[:, None] * lower * signs),
            *_upper_triangular(signs[:, None] * upper),
        ]
    )


def factor_minimal(matrix: Matrix, *, tolerance: float = 1e-6) -> list[LinearCoupling]:
    """Five factors, or six where both off-diagonal blocks are singular or nearly so.

    No smaller number serves every matrix. The factors are exact on paper, but they and
    their condition numbers grow quickly with the size: beyond about 16 coordinates use
    :func:`factor_stable`.

    Args:
        matrix: An invertible matrix of even size n >= 2, with positive determinant.
        tolerance: Largest error of the product allowed, in Frobenius norm relative to
            that of the matrix.

    Returns:
        Factors whose product is the matrix.

    Raises:
        ValueError: If the size is odd, an entry not finite, or the determinant not
            positive.
        ArithmeticError: If rounding spoils the product beyond ``tolerance``.
    """
    matrix = _checked(matrix)
    unit, scale = _unit_determinant(matrix)
    d = len(matrix) // 2
    best, error = [], math.inf
    for six in (False, True):
        if error > tolerance:
            best, error = _best_product(unit, six)
    if error > tolerance:
        raise ArithmeticError(
            f"expected a product within {tolerance:.0e} of the matrix of size "
            f"{len(matrix)}, got {error:.0e}: rounding; use factor_stable or factor_svd"
        )
    return _scaled(best, scale, d)


def factor_stable(matrix: Matrix) -> list[LinearCoupling]:
    """At most 15 factors; for rotations of norm about 3.3 at most, at any size.

    Nine serve a permutation of determinant 1, and five any rotation of the plane. For a
    matrix that is not orthogonal the factors grow with its condition number; where that
    is large, :func:`factor_svd` keeps the growth in two diagonal scales.

    Args:
        matrix: An invertible matrix of even size n >= 2, with positive determinant.

    Returns:
        Factors whose product is the matrix.

    Raises:
        ValueError: If the size is odd, an entry not finite, or the determinant not
            positive.
    """
    matrix = _checked(matrix)
    unit, scale = _unit_determinant(matrix)
    d = len(matrix) // 2
    one = np.ones(d)
    q, _ = np.linalg.qr(unit[:, :d])
    turn = sl.polar(q[:d])[0] @ sl.polar(q[d:])[0].T
    top, bottom = unit[:d] + turn @ unit[d:], unit[d:]
    w, x, y = top[:, :d], top[:, d:], bottom[:, :d]
    ratio = np.linalg.solve(w, x)
    schur = bottom[:, d:] - y @ ratio
    factors = [
        LinearCoupling("U", -turn, one),
        *_diagonal_blocks(w, schur, -1.0 if np.trace(turn) > 0 else 1.0),
        LinearCoupling("L", np.linalg.solve(schur, y), one),
        LinearCoupling("U", ratio, one),
    ]
    return _scaled(merged(factors), scale, d)


def factor_svd(matrix: Matrix) -> list[LinearCoupling]:
    """At most 31 factors: a rotation, the singular values, and another rotation.

    The stable route for any matrix: factors of norm about 3.3 at most, but for two that
    carry the singular values as scales.

    Args:
        matrix: An invertible matrix of even size n >= 2, with positive determinant.

    Returns:
        Factors whose product is the matrix.

    Raises:
        ValueError: If the size is odd, an entry not finite, or the determinant not
            positive.
    """
    matrix = _checked(matrix)
    left, values, right = np.linalg.svd(matrix)
    if np.linalg.det(left) < 0:
        left[:, -1] *= -1
        right[-1] *= -1
    d = len(matrix) // 2
    zero = np.zeros((d, d))
    return merged(
        [
            *factor_stable(left),
            LinearCoupling("U", zero, values[:d]),
            LinearCoupling("L", zero, values[d:]),
            *factor_stable(right),
        ]
    )


def four_factor_obstruction(matrix: Matrix, order: str = "LULU") -> bool:
    r"""Whether signs of two diagonals prove that no four factors make the matrix.

    With the matrix cut into W, X, Y, Z, a product L U L U needs positive diagonal
    matrices for which :math:`CW` and :math:`\Lambda S^{-1}` have the same trace, where
    :math:`S^{-1}` is the lower right block of the inverse. If the diagonal of W is
    negative and that of :math:`S^{-1}` positive, or the other way round, there are
    none, for this matrix and for all close to it.

    Args:
        matrix: An invertible matrix of even size n >= 2, with positive determinant.
        order: Which kinds the four factors are, first to last: LULU or ULUL.

    Returns:
        True if four factors are impossible; False decides nothing.

    Raises:
        ValueError: If the size is odd, an entry not finite, or the determinant not
            positive; or ``order`` is another.
    """
    if order not in ("LULU", "ULUL"):
        raise ValueError(f"expected order LULU or ULUL, got {order!r}")
    matrix = _checked(matrix)
    d = len(matrix) // 2
    if order == "ULUL":
        matrix = _swap_halves(matrix)
    if _rcond(matrix[:d, :d]) < _SINGULAR:
        return False
    one = np.sign(np.diag(matrix[:d, :d]))
    other = np.sign(np.diag(np.linalg.inv(matrix)[d:, d:]))
    return bool(abs(one.sum()) == d and (other == -one[0]).all())


def _checked(matrix: Matrix) -> Matrix:
    """The matrix in float64, or a ``ValueError``."""
    matrix = np.asarray(matrix, np.float64)
    n = len(matrix)
    if n % 2 or n == 0:
        raise ValueError(f"expected a matrix of even size, got {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("expected a finite matrix, got NaN or inf in it")
    sign, log_det = np.linalg.slogdet(matrix)
    if sign <= 0 or not np.isfinite(log_det):
        raise ValueError(
            "expected a positive determinant (scales are positive, so that of any "
            f"product is), got the sign {sign:.0f}"
        )
    if _rcond(matrix) < np.finfo(np.float64).eps:
        raise ValueError(
            "expected an invertible matrix, got one singular to rounding: condition "
            f"number {np.linalg.cond(matrix):.0e}"
        )
    return matrix


def _rcond(matrix: Half) -> float:
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(values[-1] / values[0]) if values[0] > 0 else 0.0


def _swap_halves(matrix: Matrix) -> Matrix:
    return np.roll(matrix, len(matrix) // 2, axis=(0, 1))


def _unit_determinant(matrix: Matrix) -> tuple[Matrix, float]:
    """The matrix over a number that makes its determinant 1, and the number."""
    scale = math.exp(np.linalg.slogdet(matrix)[1] / len(matrix))
    if abs(scale - 1) < len(matrix) * np.finfo(np.float64).eps:
        return matrix, 1.0
    return matrix / scale, scale


def _scaled(
    factors: list[LinearCoupling], scale: float, d: int
) -> list[LinearCoupling]:
    """Factors of the product times a number, which merges with what is there."""
    if scale == 1.0:
        return factors
    times, zero = np.full(d, scale), np.zeros((d, d))
    first, *rest = factors
    head = LinearCoupling(first.kind, first.kernel, scale * first.scale)
    return merged([head, LinearCoupling(head.swapped().kind, zero, times), *rest])


def _four(
    matrix: Matrix, p: Half, c: Float[np.ndarray, " d"], lam: Float[np.ndarray, " d"]
) -> list[LinearCoupling]:
    r"""L U L U, given P with :math:`P C W P^{-1} S = \Lambda`."""
    d = len(p)
    w, x, y, z = matrix[:d, :d], matrix[:d, d:], matrix[d:, :d], matrix[d:, d:]
    one = np.ones(d)
    a = np.linalg.solve(w.T, (p - y).T).T
    shift = np.linalg.solve(p.T, (np.eye(d) - c[:, None] * w).T).T
    return [
        LinearCoupling("L", -a, one),
        LinearCoupling("U", -shift / c[:, None], 1 / c),
        LinearCoupling("L", p, lam),
        LinearCoupling("U", c[:, None] * x + shift @ (z + a @ x), one),
    ]


def _diagonal_four(upper: Half, lower: Half, p: Half) -> list[LinearCoupling]:
    """L U L U of diag(upper, lower), where p upper = lower^-1 p."""
    one = np.ones(len(p))
    return _four(np.asarray(sl.block_diag(upper, lower)), p, one, one)


def _diagonal_blocks(w: Half, s: Half, sign: float) -> list[LinearCoupling]:
    """diag(w, s) with det(s w) = 1, by commutators: sixteen factors before merging.

    s w = O H (polar), O = g (y g^-1 y^-1) and H = k (z k^-1 z^-1), so that diag(w, s)
    is diag(s^-1 g, s g^-1) diag(y g^-1 y^T, g) diag(k, k^-1) diag(z k^-1 z^T, k). The
    sign is free; it decides how large the first factor becomes in the plane.
    """
    o, h = sl.polar(s @ w)
    g, y = _half_rotation(o)
    inverse = np.linalg.inv(s)
    one = np.eye(len(w))
    factors = [
        *(f.swapped() for f in _diagonal_four(s @ g.T, inverse @ g, sign * inverse)),
        *_diagonal_four(y @ g.T @ y.T, g, y.T),
    ]
    if np.abs(h - one).max() <= 1e-12:
        return factors
    k, k_inverse, z = _stretch_commutator(h)
    return [
        *factors,
        *(f.swapped() for f in _diagonal_four(k_inverse, k, one)),
        *_diagonal_four(z @ k_inverse @ z.T, k, z.T),
    ]


def _half_rotation(o: Half) -> tuple[Half, Half]:
    """Orthogonal g and y with o = g (y g^T y^T): half the angle in every plane."""
    form, basis = sl.schur(o, output="real")[:2]
    d = len(o)
    g, y = np.eye(d), np.eye(d)
    turned, i = [], 0
    while i < d:
        if i + 1 < d and form[i + 1, i] != 0:
            sine, cosine = (
                form[i + 1, i] - form[i, i + 1],
                form[i, i] + form[i + 1, i + 1],
            )
            _set_plane(g, y, (i, i + 1), math.atan2(sine, cosine) / 2)
            i += 2
            continue
        if form[i, i] < 0:
            turned.append(i)
        i += 1
    for pair in zip(turned[::2], turned[1::2], strict=True):
        _set_plane(g, y, pair, math.pi / 2)
    return basis @ g @ basis.T, basis @ y @ basis.T


def _set_plane(g: Half, y: Half, plane: tuple[int, int], angle: float) -> None:
    """Turn one plane of g by an angle, and reflect that of y."""
    c, s = math.cos(angle), math.sin(angle)
    g[np.ix_(plane, plane)] = [[c, -s], [s, c]]
    y[plane[1], plane[1]] = -1.0


def _stretch_commutator(h: Half) -> tuple[Half, Half, Half]:
    """k, its inverse and z with h = k (z k^-1 z^T), for positive h of determinant 1.

    In the eigenbasis z is a cyclic shift and k is diagonal, each entry the last over an
    eigenvalue; the order keeps the running product close to 1.
    """
    values, basis = np.linalg.eigh(h)
    left = list(np.argsort(values))
    order: list[int] = []
    logs, level = [0.0], 0.0
    while left:
        order.append(left.pop(-1 if level <= 0 else 0))
        level += math.log(values[order[-1]])
        logs.append(-level)
    log_k = np.array(logs[:-1])
    log_k -= (log_k.max() + log_k.min()) / 2
    e = basis[:, order]
    k, k_inverse = (e * np.exp(log_k)) @ e.T, (e * np.exp(-log_k)) @ e.T
    return k, k_inverse, e @ np.roll(e, -1, axis=1).T


def _lower_triangular(matrix: Matrix) -> list[LinearCoupling]:
    """L U L U of a lower triangular matrix with a positive diagonal."""
    d = len(matrix) // 2
    if np.array_equal(matrix, np.eye(2 * d)):
        return []
    one, two = matrix[:d, :d], matrix[d:, d:]
    below = np.linalg.solve(one.T, matrix[d:, :d].T).T
    shear = LinearCoupling("L", below, np.ones(d))
    return merged([shear, *_triangular_four(one, two)])


def _upper_triangular(matrix: Matrix) -> list[LinearCoupling]:
    """L U L U of an upper triangular matrix with a positive diagonal."""
    d = len(matrix) // 2
    if np.array_equal(matrix, np.eye(2 * d)):
        return []
    one, two = matrix[:d, :d], matrix[d:, d:]
    shear = LinearCoupling("U", np.linalg.solve(one, matrix[:d, d:]), np.ones(d))
    return merged([*_triangular_four(one, two), shear])


def _triangular_four(one: Half, two: Half) -> list[LinearCoupling]:
    """L U L U of diag(one, two), triangular: scales give both the same eigenvalues."""
    ladder = _ladder(len(one))
    c, lam = ladder / np.diag(one), ladder * np.diag(two)
    inverse = sl.solve_triangular(two, np.eye(len(two)), lower=not _is_upper(two))
    p = _similarity(c[:, None] * one, lam[:, None] * inverse)
    return _four(np.asarray(sl.block_diag(one, two)), p, c, lam)


def _ladder(d: int) -> Float[np.ndarray, " d"]:
    """Distinct eigenvalues about 1; in long ladders closer together."""
    return (2.0 if d <= 8 else 1.2) ** (np.arange(d) - (d - 1) / 2)


def _is_upper(matrix: Half) -> bool:
    return not np.tril(matrix, -1).any()


def _similarity(one: Half, other: Half) -> Half:
    """R with R one R^-1 = other: triangular both, the same distinct diagonals."""
    return np.linalg.solve(_eigenvectors(one).T, _eigenvectors(other).T).T


def _eigenvectors(matrix: Half) -> Half:
    """Eigenvectors of a triangular matrix, in the order of its diagonal."""
    if not _is_upper(matrix):
        return _eigenvectors(matrix[::-1, ::-1])[::-1, ::-1]
    vectors = np.eye(len(matrix))
    for j in range(1, len(matrix)):
        shifted = matrix[:j, :j] - matrix[j, j] * np.eye(j)
        vectors[:j, j] = sl.solve_triangular(shifted, -matrix[:j, j])
    return vectors


def _best_product(matrix: Matrix, six: bool) -> tuple[list[LinearCoupling], float]:
    """Of some attempts with other bases the best, and its relative error."""
    d = len(matrix) // 2
    best, error = [], math.inf
    for attempt, swap in itertools.product(range(_ATTEMPTS), (False, True)):
        turned = _swap_halves(matrix) if swap else matrix
        if not six and _rcond(turned[d:, :d]) < _SINGULAR:
            continue
        try:
            factors = _minimal(turned, six, attempt)
        except np.linalg.LinAlgError:  # a basis that was no basis
            continue
        off = np.linalg.norm(product(factors) - turned) / np.linalg.norm(matrix)
        if off < error:
            best = [f.swapped() for f in factors] if swap else factors
            error = float(off)
        if error < _GOOD:
            break
    return best, error


def _minimal(matrix: Matrix, six: bool, attempt: int) -> list[LinearCoupling]:
    """U L U L U of a matrix of determinant 1; L in front mends a singular corner."""
    d = len(matrix) // 2
    one = np.ones(d)
    rng = np.random.default_rng(attempt)
    # scales of an inner factor: where M is close to -1 they move it away
    log_c = rng.standard_normal(d) * (attempt % 2)
    c = np.exp(log_c - log_c.mean())
    first = []
    if six:
        q, _ = np.linalg.qr(matrix[:, :d])
        turn = sl.polar(q[d:])[0] @ sl.polar(q[:d])[0].T
        first = [LinearCoupling("L", -turn, one)]
        matrix = np.vstack([matrix[:d], matrix[d:] + turn @ matrix[:d]])
    w, x, y, z = matrix[:d, :d], matrix[:d, d:], matrix[d:, :d], matrix[d:, d:]
    q = x - w @ np.linalg.solve(y, z)
    v, r = _commutator(-np.linalg.inv(q @ y) / c, rng)
    corner = v / c[:, None]
    shift = np.linalg.solve(y.T, (corner - w).T).T
    turned = np.vstack([np.hstack([corner, x + shift @ z]), matrix[d:]])
    p = np.linalg.solve(q, r / c[:, None])
    second = LinearCoupling("U", -shift, one)
    return merged([*first, second, *_four(turned, p, c, one)])


def _commutator(m: Half, rng: np.random.Generator) -> tuple[Half, Half]:
    """V and R with R V R^-1 = V M, for a matrix M of determinant 1.

    In a basis in which M = (lower)(upper) with ones on both diagonals, diag(beta)
    lower^-1 and diag(beta) upper have the same distinct eigenvalues.
    """
    d = len(m)
    if np.abs(m - np.eye(d)).max() <= 1e-12:
        return np.eye(d), np.eye(d)
    if np.abs(m + np.eye(d)).max() <= 1e-12:
        return np.diag((-1.0) ** np.arange(d)), np.roll(np.eye(d), 1, axis=0)
    basis = _unit_pivots(m, rng)
    inside = np.linalg.solve(basis, m @ basis)
    lower = _unit_lower(inside)
    beta = _ladder(d)[:, None]
    v = beta * sl.solve_triangular(lower, np.eye(d), lower=True)
    upper = beta * np.triu(np.linalg.solve(lower, inside))
    r = _similarity(v, upper)
    return _conjugate(basis, v), _conjugate(basis, r)


def _conjugate(basis: Half, matrix: Half) -> Half:
    return np.linalg.solve(basis.T, (basis @ matrix).T).T


def _unit_lower(matrix: Half) -> Half:
    """The lower factor of LU without pivoting."""
    lower, rest = np.eye(len(matrix)), matrix.copy()
    for j in range(len(matrix) - 1):
        lower[j + 1 :, j] = rest[j + 1 :, j] / rest[j, j]
        rest[j + 1 :] -= np.outer(lower[j + 1 :, j], rest[j])
    return lower


def _unit_pivots(m: Half, rng: np.random.Generator) -> Half:
    """A basis in which all pivots of m are 1: x, then m x - x, and so on below."""
    d = len(m)
    if d == 1 or np.abs(m - np.eye(d)).max() <= 1e-12:
        return np.eye(d)
    x = _start(m, rng)
    pair = np.column_stack([x, m @ x - x])
    basis, _ = np.linalg.qr(pair, mode="complete")
    basis[:, :2] = pair
    rest = _below_first_pivot(basis, m)
    if np.abs(rest + np.eye(d - 1)).max() <= 1e-12:  # -1 has no such basis: mix
        basis[:, 2:] += pair @ rng.standard_normal((2, d - 2))
        rest = _below_first_pivot(basis, m)
    return basis @ sl.block_diag(np.eye(1), _unit_pivots(rest, rng))


def _below_first_pivot(basis: Half, m: Half) -> Float[np.ndarray, "e e"]:
    """What elimination leaves of m in a basis, the first pivot being 1."""
    inside = np.linalg.solve(basis, m @ basis)
    return inside[1:, 1:] - np.outer(inside[1:, 0], inside[0, 1:])


def _start(m: Half, rng: np.random.Generator) -> Float[np.ndarray, " d"]:
    """A unit vector x, with m x - x orthogonal to it where two random ones allow it."""
    a, b = np.linalg.qr(rng.standard_normal((len(m), 2)))[0].T
    form = np.array([[a @ m @ a, a @ m @ b], [b @ m @ a, b @ m @ b]])
    values, vectors = np.linalg.eigh((form + form.T) / 2)
    if not values[0] < 1 < values[1]:
        return a
    share = math.sqrt((1 - values[0]) / (values[1] - values[0]))
    x = np.column_stack([a, b]) @ vectors @ [math.sqrt(1 - share**2), share]
    return x if np.linalg.norm(m @ x - x) > 1e-8 else a
