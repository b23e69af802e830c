"""Distances that outliers and offsets cannot spoil, far tails and small noise, against oracles that share no
code with the package."""

import math
import sys
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy.special import ive, logsumexp
from scipy.stats import ncx2
from sklearn.datasets import make_moons

from rab_nb import knn
from rab_nb.chi import columns
from rab_nb.knn import SmoothedKNNClassifier, direct_distances, noiseless_distances, roundings

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:feature.*runs from"),
]  # oracles in many digits
N, D = 30, 20
TRUTH = 2.0488506e-07, 5.06436 # probability of class 0 and radius without any outlier


def clean():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, D)) * 2, np.r_[np.zeros(20, int), np.ones(10, int)]
    x[10:20] += 3
    return x, y, x[25:26] + .1*rng.normal(size=(1, D))


def one_row(x, size): return np.vstack([x, np.full((1, D), size)])


def one_entry(x, size):
    row = x[:1].copy()
    row[0, 3] = size
    return np.vstack([x, row])


def several(x, size):
    return np.vstack([x, np.full((1, D), size), np.full((1, D), -size), one_entry(x, size / 3)[-1:]])


@pytest.mark.parametrize('where', [one_row, one_entry, several])
@pytest.mark.parametrize('size', [1e3, 1e6, 1e9, 1e12, 1e15, 1e16, 1e20, 1e30, 3.4e38, 1e100])
def test_outliers_of_the_training_set_change_nothing(where, size):
    x, y, t = clean()
    x, y = where(x, size), np.r_[y, np.zeros(len(where(x, size)) - N, int)]
    model = SmoothedKNNClassifier().fit(x, y)
    log_p, error = model.log_proba(t)
    certificate = model.certify(t)
    assert certificate.prediction[0] == 1 and abs(certificate.radius[0] - TRUTH[1]) < 5e-6
    assert abs(math.exp(log_p[0, 0])/TRUTH[0] - 1) < 1e-7 and error.max() < 1e-6
    given = model.certify(t, model.distances(t))
    assert abs(given.radius[0] - certificate.radius[0]) < 1e-6


@pytest.mark.parametrize('offset', [1e4, 1e7, 1e10])
@pytest.mark.parametrize('k', [1, 3])
def test_common_offsets(offset, k):
    x, y, t = clean()
    x, t = np.round(x * 2**10) / 2**10, np.round(t * 2**10) / 2**10 # offsets are added without rounding
    exact = SmoothedKNNClassifier(k).fit(x, y).log_proba(t)[0]
    log_p, error = SmoothedKNNClassifier(k).fit(x + offset, y).log_proba(t + offset)
    assert (np.abs(log_p - exact) <= error + 1e-9).all() and error.max() < 1e-6


def test_a_value_for_missing_ones_on_both_sides():
    """Rows with the same fill value are as near to each other as without it, and the others are out of the
    race."""
    x, y, t = clean()
    x[:, 0] = 0
    filled, t_filled = x.copy(), t.copy()
    filled[15:, 0] = t_filled[:, 0] = 1e20
    t[:, 0] = 0
    expected = SmoothedKNNClassifier().fit(x[15:], y[15:]).log_proba(t)[0]
    log_p, error = SmoothedKNNClassifier().fit(filled, y).log_proba(t_filled)
    assert (np.abs(log_p - expected) <= error + 1e-9).all() and error.max() < 1e-6


@pytest.mark.parametrize('size', [1e16, 1e20, 3.4e38])
@pytest.mark.parametrize('entry', [True, False])
def test_an_outlying_test_point_is_named(size, entry):
    x, y, t = clean()
    t = np.vstack([t, t])
    t[1, slice(3, 4) if entry else slice(None)] = size
    model = SmoothedKNNClassifier().fit(x, y)
    with pytest.raises(
        ValueError, match=r'feature \d+ of row 1 of X is .*(impute|drop).*rescale.*larger sigma'
    ):
        model.predict(t)


def test_squares_that_overflow_are_named():
    x, y, t = clean()
    with pytest.raises(ValueError, match='feature 3 of row 30 of the training set is 1e\\+200'):
        SmoothedKNNClassifier().fit(one_entry(x, 1e200), np.r_[y, 0])
    t[0, 5] = 1e200
    with pytest.raises(ValueError, match='feature 5 of row 0 of X is 1e\\+200'):
        SmoothedKNNClassifier().fit(x, y).predict(t)


def test_integers_beyond_float64_are_refused():
    with pytest.raises(ValueError, match='feature 1 of row 0'):
        SmoothedKNNClassifier().fit(np.array([[1, 2**60 + 1], [3, 4]]), [0, 1])


@pytest.mark.parametrize('dtype', ['f4', 'f8'])
@pytest.mark.parametrize('scale', [1., 1e5, 1e-5])
def test_the_error_of_a_product_covers_it(dtype, scale):
    "Squared distances in exact fractions."
    rng = np.random.default_rng(1)
    x, t = (
        (scale * rng.normal(3, 1, size=(12, 40))).astype(dtype),
        (scale * rng.normal(3, 1, size=(1, 40))).astype(dtype),
    )
    x[0], x[1, 7] = t[0], 1e9*scale
    exact = [sum((Fraction(float(a)) - Fraction(float(b)))**2 for a, b in zip(row, t[0])) for row in x]
    rows, shift, centre, norms = knn.centred(x, .3, 'cpu')
    point = torch.from_numpy(t).double()
    placed = point.sub(centre).div_(.3)
    found = noiseless_distances(rows, shift, .3, norms, placed)[0].square().tolist()
    bound = (roundings(40)*knn.UNIT_ROUNDOFF*(norms.sqrt() + placed.norm())**2).tolist()
    direct = direct_distances(torch.from_numpy(x), None, .3, point[0]).square().tolist()
    for e, f, b, s in zip(exact, found, bound, direct):
        e = e / Fraction(.3)**2
        assert (
            abs(Fraction(f) - e) <= Fraction(b)
            and abs(Fraction(s) - e) <= Fraction(roundings(40) * knn.UNIT_ROUNDOFF) * e
        )


def test_given_distances():
    x, y, t = clean()
    t = np.vstack([t, t + .5, t - .5])
    model = SmoothedKNNClassifier().fit(x, y)
    log_p, distances = model.log_proba(t)[0], model.distances(t)
    np.testing.assert_allclose(model.log_proba(t, distances)[0], log_p, atol=1e-9)
    np.testing.assert_allclose(model.log_proba(t, distances.astype('f4'))[0], log_p, atol=1e-9)
    small = SmoothedKNNClassifier(sigma=1e-3).fit(x, y)
    np.testing.assert_allclose(small.log_proba(t, distances)[0], small.log_proba(t)[0], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match='pass what distances'): model.log_proba(t, distances[::-1])
    with pytest.raises(ValueError, match='pass what distances'): model.log_proba(t, distances*1.01)


# far tails, in 40 digits, from mixtures of chi-squared laws: all terms are positive

def tail_and_density(u, s, d):
    "P(U > u) and the density of U, as Poisson mixtures over the degrees of freedom."
    x, m = mp.mpf(u)**2/2, mp.mpf(s)**2/2
    terms = int(float(x*m)**.5 + float(m) + 20*float(x*m)**.25 + 120)
    weight, a = mp.exp(-m), mp.mpf(d)/2
    step, upper = mp.exp(-x + a*mp.log(x) - mp.loggamma(a + 1)), mp.gammainc(a, x, mp.inf, regularized=True)
    tail = density = mp.mpf(0)
    for j in range(terms):
        tail += weight*upper
        density += weight*step*(a + j)/x
        upper += step
        step *= x/(a + j + 1)
        weight *= m/(j + 1)
    return tail, density*u


def one_nn_in_many_digits(s, y, d, low, high, step=1/4):
    with mp.workdps(40):
        p = [mp.mpf(0)]*(max(y) + 1)
        for k in range(int(low/step), int(high/step)):
            both = [tail_and_density(mp.mpf(k)*step, a, d) for a in s]
            for i, c in enumerate(y):
                p[c] += both[i][1]*mp.fprod(b[0] for j, b in enumerate(both) if j != i)
        return [float(mp.log(a*step)) for a in p]


@pytest.mark.parametrize('d,far', [(1, 30.), (1, 42.), (2, 40.), (3, 44.), (30, 43.), (784, 52.)])
def test_far_tails_are_within_their_error(d, far):
    "Two leaders, a rival far behind, and a third class behind that."
    s, y = [.25, .5, far, far + 1], [0, 0, 1, 2]
    place = math.sqrt(d) + (math.sqrt(d + far**2) - math.sqrt(d))/3 # two must stay away for one to come
    exact = one_nn_in_many_digits(s, y, d, max(place - 9, .25), place + 9)
    x = np.zeros((4, d))
    x[:, 0] = s
    log_p, error = SmoothedKNNClassifier().fit(x, y).log_proba(np.zeros((1, d)))
    assert -700 < exact[1] < -150
    for c in (1, 2):
        if error[0, c] > 0: assert abs(log_p[0, c] - exact[c]) <= error[0, c] < 1e-6
        else: assert log_p[0, c] >= exact[c] # the bound


@pytest.mark.parametrize('d', [2, 30])
@pytest.mark.parametrize('leaders', [100, 5000])
def test_a_rival_behind_many_leaders(d, leaders):
    "Its hazard is below the smallest float64 where it wins, in bins and point by point."
    far, s, nu, u = 46., np.full(leaders, 2.), d/2 - 1, np.arange(1, 20*8192)/8192
    log_g = (
        (nu + 1) * np.log(u)
        - nu * math.log(far)
        - (u - far) ** 2 / 2
        + np.log(np.maximum(ive(nu, far * u), 1e-300))
    )
    exact = logsumexp(log_g + leaders*ncx2.logsf(u*u, d, 4)) - math.log(8192)
    x = np.zeros((leaders + 1, d))
    x[:, 0] = np.r_[s, far]
    log_p, error = (
        SmoothedKNNClassifier().fit(x, np.r_[np.zeros(leaders, int), 1]).log_proba(np.zeros((1, d)))
    )
    assert log_p[0, 1] >= exact - error[0, 1] - 1e-6 and error[0, 1] < 1e-3
    if error[0, 1] > 0: assert abs(log_p[0, 1] - exact) <= error[0, 1] + 1e-9*abs(exact)


@pytest.mark.parametrize('d', [1, 2, 7, 60, 784])
@pytest.mark.parametrize('s', [0., .02, .9, 5.3, 40.2, 63.9, 70.7, 400.25])
def test_tables_in_many_digits(d, s):
    "Near the law's own place and 4 below it."
    for at in (-4., 0., 3.):
        node = round(16*(math.sqrt(s*s + d) + at))
        if node < 8: continue
        log_s, log_h, log_odds = columns(np.array([s]), d, node, node)[:, 0, 0]
        u = float(np.logaddexp(0, node/16))
        if s < 100:
            with mp.workdps(40):
                S, g = tail_and_density(u, s, d)
                exact = [mp.log(S), mp.log(g/S), mp.log((1 - S)/S)]
            for found, e in zip((log_s, log_h, log_odds), exact):
                assert abs(found - float(e)) < 2e-12 * (1 + abs(float(e))) * (1 + d / 1000)
        else:
            assert abs(log_odds - (ncx2.logcdf(u*u, d, s*s) - ncx2.logsf(u*u, d, s*s))) < 1e-5


@pytest.mark.parametrize(
    'parameters', [dict(), dict(n_neighbors=5), dict(n_neighbors=15), dict(n_levels=200)]
)
def test_small_noise_needs_no_larger_tables(parameters, monkeypatch):
    """The work is counted in values of tables of the noisy distance, which a window of its own for every
    point would multiply."""
    x, y = make_moons(230, noise=.2, random_state=0)
    made = []
    def counted(*args, **kwargs):
        found = columns(*args, **kwargs)
        made.append(found.size)
        return found

    for module in [
        m
        for m in sys.modules.values()
        if getattr(m, '__name__', '').startswith('rab_nb.') and hasattr(m, 'columns')
    ]:
        monkeypatch.setattr(module, 'columns', counted)
    def values(sigma):
        for module in sys.modules.values():
            if getattr(module, '__name__', '').startswith('rab_nb.'):
                for function in vars(module).values():
                    if hasattr(function, 'cache_clear'): function.cache_clear()
        made.clear()
        SmoothedKNNClassifier(sigma=sigma, n_jobs=1, **parameters).fit(x[:200], y[:200]).log_proba(x[200:])
        return sum(made)
    usual = values(.5)
    assert usual > 0 and max(values(sigma) for sigma in (.1, .02, 1e-3, 1e-4)) < 15*usual


def test_small_noise_against_one_point_alone():
    "The probabilities at sigma = 1e-3 and 1e-4 of two points, from the law on a line through both."
    for sigma, gap in ((1e-3, 1.5), (1e-4, 2.5)):
        near, far = .3, .3 + gap*sigma
        log_p = SmoothedKNNClassifier(sigma=sigma).fit([[near], [-far]], [0, 1]).log_proba([[0.]])[0][0]
        with mp.workdps(30):
            exact = mp.log(mp.erfc(mp.mpf(gap) / 2) / 2)  # the noisy distances differ by N(gap, 2)
        assert abs(log_p[1] - float(exact)) < 1e-9
