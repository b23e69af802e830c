"""Oracles for smoothed nearest neighbours that share no code with the package.

Distances in rational arithmetic, the non-central chi law from Bessel functions or their power series, its
tails by cumulative Gauss-Legendre sums, and votes by leaving out the point that arrives last and counting
all others by class."""

import math
from fractions import Fraction

import mpmath as mp
import numpy as np
from scipy.special import gammaln, ive, ndtri_exp

LONG = np.longdouble
X16, W16 = np.polynomial.legendre.leggauss(16)


def exact_distances(x, t, sigma, k):
    "Distances in units of sigma, as float64, and how much farther than the k-th nearest each point is."
    t, sigma = [Fraction(float(a)) for a in t], Fraction(float(sigma))
    squares = [sum((Fraction(float(a)) - b)**2 for a, b in zip(row, t)) / sigma**2 for row in x]
    with mp.workdps(60):
        s = [mp.sqrt(mp.mpf(q.numerator) / q.denominator) for q in squares]
        return np.array([float(a) for a in s]), np.array([float(a - sorted(s)[k - 1]) for a in s])


def log_scaled_bessel(nu, x):
    "log(exp(-x) I_nu(x)), x > 0."
    x = np.asarray(x, float)
    out, small, large = np.empty(x.shape), x < (2000 if nu > 20 else 1), x > 100 + nu*nu
    rest = ~small & ~large
    with np.errstate(divide='ignore'): out[rest] = np.log(ive(nu, x[rest]))
    term, total = np.ones(large.sum()), 0
    for k in range(1, 40):
        total = total + term
        term = -term*(4*nu*nu - (2*k - 1)**2)/(8*k*x[large])
    out[large] = -np.log(2*math.pi*x[large])/2 + np.log(total)
    if small.any():
        z = x[small]
        k = np.arange(int(z.max()) + 60)
        terms = np.log(z/2)[:, None]*(2*k) - gammaln(k + 1) - gammaln(nu + k + 1)
        top = terms.max(1)
        out[small] = nu*np.log(z/2) + top + np.log(np.exp(terms - top[:, None]).sum(1)) - z
    return out


def log_density(v, s0, s, delta, d):
    "log density of the noisy distance s0 + v, (n, J); delta = s - s0, so that nothing cancels."
    u, w = s0 + v, v - delta[:, None]
    x = u * s[:, None]
    out = np.empty(x.shape)
    zero = s == 0
    out[zero] = (d - 1)*np.log(u) - u*u/2 - (d/2 - 1)*math.log(2) - gammaln(d/2)
    far = ~zero
    with np.errstate(divide='ignore', over='ignore'):
        ratio = np.where(
            np.abs(w) < s[:, None] / 2,
            np.log1p(w / np.maximum(s[:, None], 1e-300)),
            np.log(u / np.maximum(s[:, None], 1e-300)),
        )
    out[far] = -w[far]**2/2 + d/2*ratio[far] + np.log(s[far])[:, None] + log_scaled_bessel(d/2 - 1, x[far])
    return out


def laws(s, delta, d, width=1/4):
    """Weights (J,) of a rule in u, and F, S, g of every point at its nodes, (n, J) in extended precision. The
    last vote arrives around the point with delta = 0; points more than 60 nearer or farther are inside or
    outside for certain."""
    kth = np.abs(delta).argmin()
    s0 = s[kth]
    centre = delta + (d - .5)/(np.sqrt(s*s + d - .5) + s)
    near = np.abs(centre - centre[kth]) < 60
    low, high = max(centre[near].min() - 13, -s0), centre[near].max() + 14
    edges = low + np.arange(math.ceil((high - low)/width) + 1)*width
    if low == -s0:
        edges = np.concatenate(
            [[-s0], -s0 + width * np.geomspace(1e-9, 1, 40)[:-1], edges[1:]]
        )  # a density like a power of u
    half = np.diff(edges)/2
    v = ((edges[1:] + edges[:-1])/2)[:, None] + half[:, None]*X16
    with np.errstate(divide='ignore'):
        log_g = log_density(v.ravel(), s0, s, delta, d).reshape(len(s), *v.shape)
    g = np.exp(log_g.astype(LONG))
    mass = (g * W16).sum(2) * half
    legendre = np.polynomial.legendre.legvander(X16, 15)
    integral = np.polynomial.legendre.legint(np.linalg.inv(legendre), lbnd=-1)
    inside = np.polynomial.legendre.legvander(X16, 16) @ integral  # (16 upper ends, 16 nodes)
    below = (
        np.concatenate([np.zeros((len(s), 1)), mass.cumsum(1)[:, :-1]], 1)[..., None]
        + (g @ inside.T.astype(LONG)) * half[:, None]
    )
    from_end = np.concatenate([mass[:, ::-1].cumsum(1)[:, ::-1][:, 1:], np.zeros((len(s), 1))], 1)[..., None]
    above = from_end + (g @ (W16 - inside).T.astype(LONG)) * half[:, None]
    below, above = np.maximum(below, 0), np.maximum(above, 0)
    low_half = (below < .5) & (centre >= low)[:, None, None]
    F, S = np.where(low_half, below, 1 - above), np.where(low_half, 1 - below, above)
    weight = (half[:, None]*W16).ravel()
    return weight, *(a.reshape(len(s), -1) for a in (F, S, g))


def winner(votes): return int(np.argmax(votes)) # the smallest label wins a tie


def vote_by_leaving_one_out(s, delta, y, n_classes, d, k):
    """Probabilities (C,) in extended precision: which point is k-th, and how the k - 1 nearer ones are
    distributed over the classes."""
    weight, F, S, g = laws(s, delta, d)
    p = np.zeros(n_classes, LONG)
    for i in range(len(s)):
        state = {(0,)*n_classes: np.ones(len(weight), LONG)}
        for j in range(len(s)):
            if j == i: continue
            new = {}
            for votes, value in state.items():
                new[votes] = new.get(votes, 0) + value*S[j]
                if sum(votes) < k - 1:
                    more = tuple(v + (c == y[j]) for c, v in enumerate(votes))
                    new[more] = new.get(more, 0) + value*F[j]
            state = new
        for votes, value in state.items():
            if sum(votes) == k - 1:
                p[winner([v + (c == y[i]) for c, v in enumerate(votes)])] += weight @ (value * g[i])
    return p


def radius(p, sigma):
    "Certified radius of exact probabilities, from both logarithms."
    top = int(p.argmax())
    others = np.delete(p, top)
    if not len(others) or others.max() == 0: return math.inf
    log_q, log_b = float(np.log(others.sum())), float(np.log(others.max()))
    return max(0., sigma/2 * float(-ndtri_exp(log_q) - ndtri_exp(log_b)))


def products(polynomials, degree):
    """Product of pairs (value, rate) of polynomials (m + 1, J), cut off; in every term of the rate one
    factor is a rate."""
    value, rate = np.ones_like(polynomials[0][0][:1]), np.zeros_like(polynomials[0][0][:1])
    for v, r in polynomials:
        new_v, new_r = (
            np.zeros((min(len(value) + len(v) - 1, degree + 1), *v.shape[1:]), v.dtype) for _ in range(2)
        )
        for k in range(len(v)):
            end = min(len(value), len(new_v) - k)
            if end <= 0: continue
            new_v[k:k + end] += value[:end]*v[k]
            new_r[k:k + end] += rate[:end]*v[k] + value[:end]*r[k]
        value, rate = new_v, new_r
    return value, rate


def count_votes(pairs, k):
    """Rates (C, J) at which the k-th neighbour arrives and class c has won, each winner and each number of
    votes on its own."""
    out = []
    for c, (v, r) in enumerate(pairs):
        total = 0
        for m in range(1, min(k, len(v) - 1) + 1):
            others = [tuple(a[:m + (j > c)] for a in pair) for j, pair in enumerate(pairs) if j != c]
            value, rate = products(
                others + [tuple(np.ones_like(a[:1]) * one for a, one in zip(pairs[0], (1, 0)))], k - m
            )
            if len(value) > k - m: total = total + r[m]*value[k - m] + v[m]*rate[k - m]
        out.append(total + 0*v[0])
    return np.stack(out)


def binomial_pair(n, F, S, g, k):
    """P(j of n equal points are within) and the rate at which the j-th arrives, j = 0 ... k, from logarithms
    of binomial coefficients."""
    j, m = np.arange(min(n, k) + 1)[:, None], n
    def log_choose(n, j): return (gammaln(n + 1) - gammaln(j + 1) - gammaln(n - j + 1)).astype(LONG)
    with np.errstate(divide='ignore', invalid='ignore'):
        log_f, log_s = np.log(np.maximum(F, LONG(1e-4900))), np.log(np.maximum(S, LONG(1e-4900)))
        value = np.exp(log_choose(m, j) + j*log_f + (m - j)*log_s)
        rate = np.zeros_like(value)
        rate[1:] = m*g*np.exp(log_choose(m - 1, j[1:] - 1) + (j[1:] - 1)*log_f + (m - j[1:])*log_s)
    return value, rate


def vote_of_groups(s, counts, y, n_classes, d, k, width=1/16):
    "Probabilities (C,) where each of a few distances belongs to `counts` points of one class."
    weight, F, S, g = laws(s, s - np.sort(np.repeat(s, counts))[k - 1], d, width)
    inside = sum(n*f for n, f in zip(counts, F))
    some = (inside > k*1e-14) & (inside < 40*k + 4000)
    weight, F, S, g = weight[some], F[:, some], S[:, some], g[:, some]
    pairs = [
        products(
            [binomial_pair(n, f, t, h, k) for n, f, t, h, label in zip(counts, F, S, g, y) if label == c], k
        )
        for c in range(n_classes)
    ]
    return count_votes(pairs, k) @ weight


def vote_of_many(s, y, n_classes, d, k, nodes=120):
    """Probabilities (C,) by multiplying in one point after the other, with scipy's distribution functions:
    for votes that are not decided."""
    from scipy.stats import ncx2
    u = np.linspace(max(1e-3, math.sqrt(d + s.min()**2) - 10), math.sqrt(d + s.max()**2) + 10, 400)
    inside = np.array([ncx2.cdf(a*a, d, s**2).sum() for a in u])
    low, high = (
        u[max(np.searchsorted(inside, k * math.exp(-9 / math.sqrt(k) - 2 * math.log(10) / k * 8)) - 1, 0)],
        u[min(np.searchsorted(inside, k + 9 * math.sqrt(k) + 40), len(u) - 1)],
    )
    x, w = np.polynomial.legendre.leggauss(nodes)
    u, w = (low + high)/2 + (high - low)/2*x, w*(high - low)/2
    pairs = []
    for c in range(n_classes):
        v, r = np.zeros((2, k + 1, nodes))
        v[0] = 1
        for part in np.array_split(s[y == c], max(1, (y == c).sum()//200)):
            F, S, g = (
                ncx2.cdf(u * u, d, part[:, None] ** 2),
                ncx2.sf(u * u, d, part[:, None] ** 2),
                2 * u * ncx2.pdf(u * u, d, part[:, None] ** 2),
            )
            for f, t, h in zip(F, S, g):
                r[1:] = r[1:]*t + r[:-1]*f + v[:-1]*h
                v[1:], v[0] = v[1:]*t + v[:-1]*f, v[0]*t
        pairs.append((v, r))
    return count_votes(pairs, k) @ w
