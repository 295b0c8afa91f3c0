"""Signed permutations as linear couplings: quarter turns in disjoint planes.

A quarter turn of the plane of one upper and one lower coordinate is three shears, and
turns in disjoint planes go together: such a *round* is three factors. Source: the
route of Koehler, Mehta & Risteski (2021), counted anew in chapter 12 of the book.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from .linear_coupling import LinearCoupling, merged, product

Plane = tuple[int, int]  # an upper coordinate, and a lower one counted from d


def factor_signed_permutation(
    matrix: Float[np.ndarray, "n n"],
) -> list[LinearCoupling]:
    """At most 19 factors of a signed permutation of determinant 1, scales all 1."""
    d = len(matrix) // 2
    factors: list[LinearCoupling] = []
    for involution in _involutions(np.abs(matrix).argmax(axis=0)):
        for planes in _rounds(involution, d):
            factors += _quarter_turns(planes, d)
    signs = matrix if not factors else product(factors).round().T @ matrix
    return merged([*factors, *_signs(np.diag(signs), d)])


def _involutions(image: Int[np.ndarray, " n"]) -> tuple[dict[int, int], dict[int, int]]:
    """Two maps of order two, the second acting first: t -> 1 - t after t -> -t."""
    first, second, seen = {}, {}, set()
    for start in range(len(image)):
        if start in seen:
            continue
        cycle = [start]
        while (after := int(image[cycle[-1]])) != start:
            cycle.append(after)
        seen.update(cycle)
        for t, a in enumerate(cycle):
            first[a] = cycle[-t % len(cycle)]
            second[a] = cycle[(1 - t) % len(cycle)]
    return second, first


def _rounds(swap: dict[int, int], d: int) -> list[list[Plane]]:
    """Rounds of swaps across the halves whose product is the involution, up to signs.

    Two swaps inside different halves are two rounds,
    (i j)(k m) = (i k)(j m)·(i m)(j k);
    one inside a half is three, (i j) = (i k)·(j k)·(i k), by way of a fixed point k of
    the other half. There are always enough of these.
    """
    pairs = [(a, b) for a, b in sorted(swap.items()) if a < b]
    upper = [(a, b) for a, b in pairs if b < d]
    lower = [(a - d, b - d) for a, b in pairs if a >= d]
    rounds: list[list[Plane]] = [[(a, b - d) for a, b in pairs if a < d <= b], [], []]
    both = min(len(upper), len(lower))
    for (i, j), (k, m) in zip(upper[:both], lower[:both], strict=True):
        rounds[0] += [(i, k), (j, m)]
        rounds[1] += [(i, m), (j, k)]
    fixed = [
        [a for a in range(d) if swap[a] == a],
        [a for a in range(d) if swap[a + d] == a + d],
    ]
    left = [((i, k), (j, k)) for (i, j), k in zip(upper[both:], fixed[1], strict=False)]
    left += [
        ((k, i), (k, j)) for (i, j), k in zip(lower[both:], fixed[0], strict=False)
    ]
    for one, other in left:
        for planes, plane in zip(rounds, (one, other, one), strict=True):
            planes.append(plane)
    return [planes for planes in rounds if planes]


def _signs(signs: Float[np.ndarray, " n"], d: int) -> list[LinearCoupling]:
    """Half turns, at most two blocks of four factors, for an even number of -1."""
    upper = np.flatnonzero(signs[:d] < 0).tolist()
    lower = np.flatnonzero(signs[d:] < 0).tolist()
    both = min(len(upper), len(lower))
    first = list(zip(upper[:both], lower[:both], strict=True))
    upper, lower = upper[both:], lower[both:]
    # what is left lies in one half: turned with a partner that turns a second time
    half = max(len(upper), len(lower)) // 2
    second: list[Plane] = []
    for side, one_is_upper in ((upper, True), (lower, False)):
        if not side:
            continue
        taken = {plane[one_is_upper] for plane in first}
        partners = [k for k in range(d) if k not in taken][:half]
        for i, j, k in zip(side[:half], side[half:], partners, strict=True):
            first.append((i, k) if one_is_upper else (k, i))
            second.append((j, k) if one_is_upper else (k, j))
    return [
        *_half_turns(first, d),
        *(factor.swapped() for factor in _half_turns([(b, a) for a, b in second], d)),
    ]


def _quarter_turns(planes: Iterable[Plane], d: int) -> list[LinearCoupling]:
    """The turn (x, y) -> (-y, x) in each plane, as L U L."""
    e = _incidence(planes, d)
    shear = LinearCoupling("L", e, np.ones(d))
    return [shear, LinearCoupling("U", -e.T, np.ones(d)), shear]


def _half_turns(planes: Iterable[Plane], d: int) -> list[LinearCoupling]:
    """The turn (x, y) -> (-x, -y) in each plane, as L U L U."""
    e = _incidence(planes, d)
    one = np.ones(d)
    pair = [LinearCoupling("L", e, one), LinearCoupling("U", -2 * e.T, one)]
    return [*pair, *pair]


def _incidence(planes: Iterable[Plane], d: int) -> Float[np.ndarray, "d d"]:
    e = np.zeros((d, d))
    for i, j in planes:
        e[j, i] = 1.0
    return e
