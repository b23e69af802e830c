"Radii with wrong labels against 36 digits, enumeration, linear order of cells and a real adversary."
import itertools
import math

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rab_nb.theory import LevelSets, gaussian_radius, joint_norm, relabelled_radius, robustness_condition


def law(flip, r, n_classes):
    "{k: clean probability} by convolution, in mpmath"
    other = mp.mpf(flip) / (n_classes - 1)
    single = {1: 1 - mp.mpf(flip), 0: mp.mpf(flip) - other, -1: other}
    total = {0: mp.mpf(1)}
    for _ in range(r):
        new = {}
        for (k, p), (v, q) in itertools.product(total.items(), single.items()):
            if q:
                new[k + v] = new.get(k + v, mp.mpf(0)) + p * q
        total = new
    return total, mp.log((1 - mp.mpf(flip)) / other)


def bisect(f, low, high, steps=130):
    for _ in range(steps):
        mid = (low + high) / 2
        low, high = (mid, high) if f(mid) > 0 else (low, mid)
    return (low + high) / 2


def clean_mass(total, step, s, q):
    "The most clean mass of a set that has q under the poisoned law, by Neyman and Pearson, at shift s > 0"
    poisoned = lambda t: mp.fsum(p * mp.exp(-k * step) * mp.ncdf(-(t - k * step) / s - s / 2)
                                 for k, p in total.items())
    reach = max(abs(k) for k in total) * step + s * s + 80 * s
    t = bisect(lambda t: poisoned(t) - q, -reach, reach)
    return mp.fsum(p * mp.ncdf(s / 2 - (t - k * step) / s) for k, p in total.items())


def spare(q, flip, r, n_classes=2, p_b=None):
    "shift -> what the winner with 1 - q has left beyond its rival, > 0 where the prediction is certain"
    total, step = law(flip, r, n_classes)
    if p_b is None: return lambda s: 1 - 2 * clean_mass(total, step, s, q)
    return lambda s: 1 - clean_mass(total, step, s, q) - clean_mass(total, step, s, mp.mpf(p_b))


def right(got, left):
    "Whether a radius is certified, and one that is 1e-9 larger is not"
    if np.isnan(got): return left(mp.mpf(10)**-13) <= 0
    got = mp.mpf(float(got))
    return left(got) > 0 and left(got + max(got / 10**9, mp.mpf(10)**-12)) <= 0


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(36):
        yield


CASES = [(.9, .4, 1), (.99, .4, 5), (.999, .475, 12), (.6, .49, 2), (.9999, .3, 4), (1 - 1e-12, .1, 3),
         (.95, .2, 1),
         (.999999, .25, 7), (.51, .499, 1), (1 - 1e-9, .01, 1), (1 - 1e-15, .02, 2)]


@pytest.mark.parametrize('p_a, flip, r', CASES)
def test_two_classes(p_a, flip, r):
    assert right(relabelled_radius(p_a, 1., flip, r), spare(1 - mp.mpf(p_a), flip, r))


@pytest.mark.parametrize('p_a, p_b, flip, r, c',
                         [(.9, .02, .6, 2, 3), (.99, .01, .7, 3, 4), (.999, .0005, .85, 6, 10),
                          (.8, .15, .5, 1, 3),
                          (.97, .03, .4, 3, 3), (.7, .1, .66, 4, 3)])
def test_many_classes(p_a, p_b, flip, r, c):
    assert right(relabelled_radius(p_a, 1., flip, r, c, p_b), spare(1 - mp.mpf(p_a), flip, r, c, p_b))


@pytest.mark.parametrize('exponent', [20, 100, 300])
def test_far_tails(exponent):
    log_q = -exponent * math.log(10)
    got = relabelled_radius(1., 1., .3, 5, log_q_a=log_q, log_p_b=log_q)
    assert right(got, spare(mp.exp(mp.mpf(log_q)), .3, 5))


def test_near_nothing():
    "A radius that nearly vanishes is still right: p_A just above what two wrong labels cost"
    from scipy.optimize import brentq
    nothing = brentq(lambda q: np.nan_to_num(relabelled_radius(1 - q, 1., .3, 2), nan=-1.) - 1e-3, 1e-4, .4,
                     xtol=1e-16)
    got = relabelled_radius(1 - nothing, 1., .3, 2)
    assert right(got, spare(1 - mp.mpf(1 - nothing), .3, 2)) and .0005 < got < .002


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.floats(.01, .499), st.integers(1, 9), st.floats(1e-7, .49))
def test_cells_agree(flip, r, q):
    """Fine cells of the line, on every branch of the labels, sorted by ratio: no radius is too large, and
    none far too small"""
    from scipy.stats import binom, norm
    got = relabelled_radius(1 - q, 1., flip, r)
    grid = np.r_[-np.inf, np.linspace(-12, 18, 4001), np.inf]
    k = np.arange(r + 1)
    def least(s):
        poisoned = np.outer(binom.pmf(k, r, flip), np.diff(norm.cdf(grid))).ravel()
        clean = np.outer(binom.pmf(k, r, 1 - flip), np.diff(norm.cdf(grid, loc=s))).ravel()
        return LevelSets(poisoned, clean,
                         tolerance=0.).least(1 - q) if abs(poisoned.sum() - 1) < 1e-9 else np.nan
    if np.isnan(got):
        assert least(1e-6) < .5 + 1e-6
    else:
        assert least(got * (1 - 1e-4)) > .5 - 1e-6 and least(got * 1.02 + .02) < .5 + 1e-3


def test_without_marks_it_is_the_condition_for_labels():
    "At shift 0 condition (12) decides over the finite law of the labels"
    for flip, r, q in itertools.product((.1, .3, .45), (1, 2, 5), (1e-6, 1e-3, .02, .1, .3, .45)):
        outcomes = np.array(list(itertools.product([0, 1], repeat=r)))
        clean = np.prod(np.where(outcomes, 1 - flip, flip), 1)
        poisoned = np.prod(np.where(outcomes, flip, 1 - flip), 1)
        if abs(LevelSets(poisoned, clean).least(1 - q) - .5) < 1e-12:  # a tie: neither may certify it
            assert np.isnan(relabelled_radius(1 - q, 1., flip, r))
            assert not robustness_condition(list(poisoned), list(clean), 1 - q, q)
            continue
        certified = robustness_condition(list(poisoned), list(clean), 1 - q, q)
        assert certified == (not np.isnan(relabelled_radius(1 - q, 1., flip, r)))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.floats(.001, .49), st.integers(0, 60), st.floats(1e-250, .499), st.integers(2, 12),
       st.floats(.01, 100.))
def test_monotone(flip, r, q, n_classes, sigma):
    usual = dict(p_a=1 - q, sigma=sigma, flip=flip, n_relabelled=r, n_classes=n_classes,
                 p_b=q / 2, log_q_a=math.log(q), log_p_b=math.log(q / 2))
    radius = lambda **change: float(np.nan_to_num(relabelled_radius(**usual | change), nan=-1.))
    slack = 1e-9 * sigma
    now = radius()
    assert radius(n_relabelled=r + 1) <= now + slack
    assert radius(n_classes=n_classes + 1) <= now + slack
    assert radius(log_q_a=math.log(q) - .1) >= now - slack
    assert radius(log_p_b=math.log(q / 2) - .1) >= now - slack
    assert radius(flip=min(flip * 1.05, .4999)) >= now - slack
    assert radius(sigma=1.5 * sigma) >= now - slack
    whole = gaussian_radius(1 - q, q / 2, sigma, math.log(q), math.log(q / 2))
    assert now <= whole * (1 + 1e-12) and radius(n_relabelled=0) == whole


def test_array_arguments():
    p_a = np.array([[.9, .999], [.9999, 1 - 1e-9]])
    rows = np.array([3, 0])
    got = relabelled_radius(p_a, 2., .45, rows)
    each = [[float(relabelled_radius(p, 2., .45, int(r))) for p, r in zip(row, rows)] for row in p_a]
    assert np.allclose(got, each, rtol=1e-10, equal_nan=True) and got.shape == (2, 2)
    assert np.isfinite(relabelled_radius(1 - 1e-9, 1., .475,
                                         1000)) == np.isfinite(
                                             relabelled_radius([1 - 1e-9], 1., .475, 1000)[0])


def test_many_rows():
    log_q = -200.
    got = relabelled_radius(1., 1., .4985, 100_000, log_q_a=log_q, log_p_b=log_q)
    assert 0 < got < gaussian_radius(1., 1., 1., log_q, log_q)
    # the log ratio is nearly Gaussian here
    sd = 2 * math.sqrt(100_000 * .4985 * .5015) * math.log(.5015 / .4985)
    limit = gaussian_radius(1., 1., 1., log_q, log_q)**2 - (sd)**2
    assert abs(got**2 / limit - 1) < 2e-3


@pytest.mark.parametrize('bad, word',
                         [(dict(flip=.5), 'flip'), (dict(flip=-.1), 'flip'),
                          (dict(flip=float('nan')), 'flip'), (dict(n_relabelled=-1), 'n_relabelled'),
                          (dict(n_relabelled=1.5), 'n_relabelled'), (dict(n_classes=1), 'n_classes'),
                          (dict(p_a=1.1), 'p_a'), (dict(sigma=0.), 'sigma'),
                          (dict(n_relabelled='3'), 'n_relabelled'), (dict(p_b=2.), 'p_b'),
                          (dict(n_relabelled=10**9), 'n_relabelled'), (dict(flip=[.1, .2]), 'flip')])
def test_bad_input(bad, word):
    with pytest.raises(ValueError, match=word):
        relabelled_radius(**dict(p_a=.9, sigma=1., flip=.3, n_relabelled=1) | bad)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(0, 1e6), max_size=8), st.floats(1e-3, 1e3), st.floats(0, 1e3), st.floats(1e-3, 1e3))
def test_joint_norm(norms, sigma, test_norm, test_sigma):
    exact = sigma * mp.sqrt(sum((mp.mpf(v) / sigma)**2 for v in norms) + (mp.mpf(test_norm) / test_sigma)**2)
    assert joint_norm(norms, sigma, test_norm, test_sigma) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize('arguments',
                         [([1.], 1., .1), ([1.], 1., .1, 0.), ([-1.], 1.), ([1.], 0.), ([1.], 1., -1., 1.),
                          ([float('nan')], 1.), ([1.], 1., 1., -1.)])
def test_joint_norm_refuses(arguments):
    with pytest.raises(ValueError):
        joint_norm(*arguments)


@pytest.mark.parametrize('n_classes', [2, 3, 10])
def test_flip_ends_where_the_true_label_stops_being_the_likeliest(n_classes):
    end = 1 - 1 / n_classes
    for flip in (end, np.nextafter(end, 1), 1., 1.5, math.inf):
        with pytest.raises(ValueError, match='flip'):
            relabelled_radius(.999, 1., flip, 1, n_classes)
    assert relabelled_radius(.999, 1., end - 1e-6, 1, n_classes) > 3 # nothing to be seen of one wrong label


def test_without_label_noise_no_wrong_label_is_covered():
    got = relabelled_radius(.999, 1., 0., np.array([0, 1, 7]))
    assert got[0] == gaussian_radius(.999, .001, 1.) and np.isnan(got[1:]).all()


def level(total, step, s, log_p):
    "t with P_poisoned(ratio > t) = p, by Newton steps for log P that a bracket keeps safe"
    above = lambda t: mp.fsum(p * mp.exp(-k * step) * mp.ncdf(-(t - k * step) / s - s / 2)
                              for k, p in total.items())
    slope = lambda t: mp.fsum(p * mp.exp(-k * step) * mp.npdf((t - k * step) / s + s / 2)
                              for k, p in total.items()) / s
    top = max(abs(k) for k in total) * step
    low, high = -top - 60 * s - s * s - 5, top + 5 + s * (60 + mp.sqrt(2 * abs(log_p))) + s * s
    t = (low + high) / 2
    for n in range(900):
        p = above(t)
        low, high = (t, high) if p > mp.exp(log_p) else (low, t)
        d = slope(t)
        new = t + (mp.log(p) - log_p) * p / d if d else low
        if abs(new - t) < mp.mpf(10)**-28 * (abs(t) + s): return new
        t = new if low < new < high and n % 4 else (low + high) / 2
    return t


def lead(log_q_a, log_p_b, flip, r, n_classes):
    "shift -> log of what is left to A over the most that B has, with digits where both are tiny"
    total, step = law(flip, r, n_classes)
    def f(s):
        a, b = level(total, step, s, mp.mpf(log_q_a)), level(total, step, s, mp.mpf(log_p_b))
        least = mp.fsum(p * mp.ncdf((a - k * step) / s - s / 2) for k, p in total.items())
        return mp.log(least / mp.fsum(p * mp.ncdf(s / 2 - (b - k * step) / s) for k, p in total.items()))
    return f


PAIRS = [(.5, -690., .3, 1, 3), (.5, -100., .45, 3, 2), (.7, math.log(.05), .6, 1, 3),
         (-690., -695., .66, 2, 3),
         (1e-12, -60., .05, 1, 10), (.01, math.log(.01) - 1e-9, .5, 5, 3), (1e-6, -20., .989, 4, 100),
         (.4, math.log(.35), .8999, 3, 10), (1e-3, -7.5, .6, 12, 3), (1e-9, -40., .2, 6, 4)]


@pytest.mark.parametrize('q, log_p_b, flip, r, n_classes', PAIRS)
def test_a_rival_of_its_own(q, log_p_b, flip, r, n_classes):
    log_q = q if q < 0 else math.log(q)
    got = relabelled_radius(1., 1., flip, r, n_classes, 0., log_q_a=log_q, log_p_b=log_p_b)
    assert right(got, lead(log_q, log_p_b, flip, r, n_classes))


@pytest.mark.parametrize('flip, r, n_classes', [(.6, 8, 3), (.88, 10, 10), (.45, 12, 2)])
def test_thousands_of_rivals(flip, r, n_classes):
    "Panels, used for many pairs at once, against 36 digits and against the same pairs one by one"
    g = np.random.default_rng(r)
    log_q = g.uniform(-50, -1, 600)
    log_p = log_q - g.exponential(6, 600)
    many = relabelled_radius(1., 1., flip, r, n_classes, 0., log_q_a=log_q, log_p_b=log_p)
    for i in (*g.choice(600, 1), np.nanargmin(many)):
        assert right(many[i], lead(log_q[i], log_p[i], flip, r, n_classes))
    some = g.choice(600, 60)
    one = relabelled_radius(1., 1., flip, r, n_classes, 0., log_q_a=log_q[some], log_p_b=log_p[some])
    assert np.allclose(one, many[some], rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize('two, flip, r, n_classes', [
    (False, .6, 20, 3), (True, .45, 40, 2), (False, .66, 2, 3)])
def test_a_thousandth_of_sigma_has_nine_digits(two, flip, r, n_classes):
    from scipy.optimize import brentq
    other = 0. if two else -1.1
    def radius(log_q):
        logs = dict(log_q_a=log_q, log_p_b=log_q + other)
        return float(relabelled_radius(1., 1., flip, r, n_classes, 0., **logs))
    log_q = brentq(lambda v: np.nan_to_num(radius(v), nan=-1.) - .0011, -40, -.05, xtol=1e-13)
    assert .001 < radius(log_q) < .0012
    assert right(radius(log_q), lead(log_q, log_q + other, flip, r, n_classes))


def test_ten_thousand_values_a_second():
    "In processor time, with room for slower machines"
    import time
    g = np.random.default_rng(0)
    q = 10**g.uniform(-14, -.5, 10_000)
    for flip, r, n_classes in ((.5, 5, 3), (.655, 1000, 3), (.89, 1000, 10)):
        start = time.process_time()
        logs = dict(log_q_a=np.log(q), log_p_b=np.log(q / 3))
        got = relabelled_radius(1 - q, 1., flip, r, n_classes, q / 3, **logs)
        assert time.process_time() - start < 6 and np.isfinite(got).mean() > .9


def test_a_rival_that_never_comes():
    assert relabelled_radius(.9, 1., .3, 1, 3, 0.) == math.inf == gaussian_radius(.9, 0., 1.)
    deep = relabelled_radius(.5, 1., .3, 1, 3, 0., log_p_b=[-1e3, -1e4, -9e4])
    alone = gaussian_radius(.5, 0., 1., log_p_b=[-1e3, -1e4, -9e4])
    assert ((deep < alone) & (deep > .99 * alone)).all()


@pytest.mark.parametrize('flip, r, n_classes', [
    (1e-300, 2, 3), (1e-12, 1, 3), (2/3 - 1e-9, 30, 3), (.5 - 1e-12, 9, 2)])
def test_flips_at_both_ends(flip, r, n_classes):
    q = np.array([1e-9, 1e-30, 1e-250])
    got = relabelled_radius(1., 1., flip, r, n_classes, 0., log_q_a=np.log(q), log_p_b=np.log(q / 9))
    alone = gaussian_radius(1., 0., 1., log_q_a=np.log(q), log_p_b=np.log(q / 9))
    assert not (got > alone).any()
    assert np.allclose(got, alone, rtol=1e-6) if flip > .4 else np.isnan(got[0])
