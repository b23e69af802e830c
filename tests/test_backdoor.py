"""Certificates of the whole backdoor: never too large by enumeration and cells, for every noise; files,
errors, words."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from rab_nb.certificate import Certificate, VoteStatistics, certify, certify_statistics, exact_certificate
from rab_nb.noise import GaussianNoise, LaplaceNoise, UniformNoise
from rab_nb.theory import LevelSets, joint_norm, robustness_condition

UNIT = dict(gaussian=(GaussianNoise(1.), stats.norm), laplace=(LaplaceNoise(1.), stats.laplace),
            uniform=(UniformNoise(0., 1.), stats.uniform))


def certificate(p_a, p_b, noise, flip, n_classes=2, **more):
    "One point of class 0 with these two probabilities"
    d = dict(d=1) if noise.norm == 'linf' else {}
    return exact_certificate([0], [p_a], [p_b], noise, classes=n_classes, label_noise=flip, **d, **more)


def label_masses(flip, r, n_classes):
    "Masses of all outcomes of r labels, poisoned 1 and clean 0, by enumeration"
    single = [np.full(n_classes, flip / (n_classes - 1)) for _ in range(2)]
    single[0][1], single[1][0] = 1 - flip, 1 - flip
    out = [np.ones(1), np.ones(1)]
    for _ in range(r):
        out = [np.outer(a, b).ravel() for a, b in zip(out, single)]
    return out


def product(flip, r, n_classes, family, shift, n=3001):
    "Fine cells of the line, on every branch of the labels"
    edges = np.r_[-np.inf, np.linspace(-30, 30, n), 0., 1., shift, 1 + shift, np.inf]
    cells = [np.diff(f.cdf(np.unique(edges))) for f in (family(), family(loc=shift))]
    return [np.outer(m, c).ravel() for m, c in zip(label_masses(flip, r, n_classes), cells)]


def holds(flip, r, n_classes, family, shift, p_a, p_b):
    levels = LevelSets(*product(flip, r, n_classes, family, shift), tolerance=0.)
    return levels.least(p_a) - (1 - levels.least(1 - p_b))


@pytest.mark.parametrize('name', UNIT)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.floats(.05, .98), st.integers(1, 4), st.integers(2, 3), st.floats(1e-5, .3), st.floats(.05, 1.))
def test_never_too_large_and_tight(name, part, r, n_classes, q, share):
    "The certified edge by cells sorted by their ratio: certain just inside, not certain clearly outside"
    noise, family = UNIT[name]
    flip, p_a, p_b = part * (1 - 1 / n_classes), 1 - q, q if n_classes == 2 else share * q
    c = certificate(p_a, p_b, noise, flip, n_classes)
    size = dict(d=1, n_poisoned=1) if name == 'uniform' else {}
    low = float(np.nan_to_num(noise.relabelled_radius(p_a, p_b, flip, r, n_classes, **size)))
    if low:
        assert c.covers(1, low * (1 - 1e-9), relabelled=r)[0]
    assert not c.covers(1, low, relabelled=r)[0]
    check = lambda s: holds(flip, r, n_classes, family, s, p_a, p_b)
    assert check(max(.98 * low, 1e-9)) > -1e-6 or low < 1e-9
    if low < .9 or name != 'uniform':
        assert check(1.02 * low + .02) < 2e-3
    if low < 1e-9:
        assert check(1e-9) < 1e-6


@pytest.mark.parametrize('name', UNIT)
def test_labels_alone_do_not_ask_for_the_noise(name):
    "Without marks the finite law of the labels decides by condition (12), whatever the noise on the features"
    noise, _ = UNIT[name]
    for flip, r, q in [(.1, 1, .02), (.1, 1, .3), (.3, 2, .05), (.3, 5, .02), (.3, 5, 1e-4), (.45, 5, .2),
                       (.45, 5, .4)]:
        certified = robustness_condition(*map(list, label_masses(flip, r, 2)), 1 - q, q)
        assert certificate(1 - q, q, noise, flip).covers(r, 0., relabelled=True)[0] == certified


def test_a_spread_out_laplace_pattern_stays_covered():
    "Two entries of half the norm, by cells of the plane: the l1 radius with labels holds for them as well"
    flip, r, p_a = .35, 2, .97
    radius = float(certificate(p_a, 1 - p_a, LaplaceNoise(1.), flip).radius_with(r)[0])
    edges = np.r_[-np.inf, np.linspace(-12, 14, 401), np.inf]
    line = [np.diff(stats.laplace(k * radius / 2).cdf(edges)) for k in (0, 1)]
    cells = [np.outer(m, np.outer(c, c).ravel()).ravel() for m, c in zip(label_masses(flip, r, 2), line)]
    assert float(LevelSets(*cells, tolerance=0.).least(p_a)) > .5 > 1 - p_a


def test_worst_case_classifier_breaks_just_outside():
    """A real adversary: the classifier that gives the rival the likeliest outcomes of the clean law, by
    simulation"""
    rng, flip, r, p_a, n = np.random.default_rng(1), .4, 4, .985, 400_000
    c = certificate(p_a, 1 - p_a, GaussianNoise(2.), flip)
    step, radius = np.log((1 - flip) / flip), float(c.radius_with(r)[0]) / 2
    def ratio(s, clean):
        k = 2 * rng.binomial(r, 1 - flip if clean else flip, n) - r
        return k * step + s * rng.normal(size=n) + (1 if clean else -1) * s * s / 2
    for s in (.93 * radius, 1.07 * radius):
        left = (ratio(s, True) < np.quantile(ratio(s, False), p_a)).mean()
        assert (left > .5) == bool(c.covers(1, 2 * s, relabelled=r)[0])


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.floats(.1, 9.), st.floats(.01, 9.), st.floats(0, 2.), st.floats(0, 2.), st.integers(1, 300),
       st.integers(0, 5))
def test_covers_agrees_with_the_joint_norm(sigma, test_sigma, size, mark, n, r):
    c = certificate(.995, .005, GaussianNoise(sigma), .45, test_sigma=test_sigma)
    total, radius = joint_norm(np.full(n, size), sigma, mark, test_sigma), float(c.radius_with(r)[0])
    if abs(total / radius - 1) > 1e-9:
        assert c.covers(n, size, r, mark)[0] == (total < radius)


def test_monotone_in_the_attack():
    c = certificate(.999, .001, GaussianNoise(1.), .45, test_sigma=.5)
    grid = c.covers(*np.meshgrid([1, 10, 100], [0., .1, .3], [0, 5, 40], [0., .2, .6], indexing='ij'))[..., 0]
    for axis in range(4):
        assert (np.diff(grid.astype(int), axis=axis) <= 0).all()
    assert 0 < grid.mean() < 1


OUTPUTS = np.random.default_rng(0).dirichlet([.2, 6, .2], (900, 6))


@pytest.mark.parametrize('bound', ['hoeffding', 'betting'])
def test_all_ways_to_a_certificate_carry_it(bound):
    reach = dict(label_noise=.6, test_sigma=.25, n_train=400)
    c = certify(OUTPUTS, GaussianNoise(1.), .01, bound, 'soft', ['a', 'b', 'c'], **reach)
    assert (c.label_noise, c.test_sigma, c.n_train) == (.6, .25, 400)
    if bound != 'betting':
        stats_ = VoteStatistics.from_probabilities(OUTPUTS)
        assert certify_statistics(stats_, GaussianNoise(1.), .01, bound, classes=['a', 'b', 'c'],
                                  **reach) == c
    positional = certify(OUTPUTS, GaussianNoise(1.), .01, bound, 'soft', ['a', 'b', 'c'], .6, .25,
                         n_train=400)
    assert positional == c and c != replace(c, label_noise=.5) and c != replace(c, test_sigma=None)
    expected = GaussianNoise(1.).relabelled_radius(c.p_a, c.p_b, .6, 2, 3)
    np.testing.assert_array_equal(c.radius_with(2), np.where(c.prediction < 0, np.nan, expected))
    assert c[2:4].test_sigma == .25 and Certificate.concatenate([c[:2], c[2:]]) == c
    with pytest.raises(ValueError, match='label_noise'):
        Certificate.concatenate([c, replace(c, label_noise=.5)])


def test_files_old_and_new(tmp_path):
    c = certify(OUTPUTS, GaussianNoise(1.), .01, label_noise=.6, test_sigma=.25, n_train=400)
    c.to_csv(tmp_path / 'c.csv')
    assert Certificate.from_csv(tmp_path / 'c.csv') == c
    plain = certify(OUTPUTS, GaussianNoise(1.), .01)
    plain.to_csv(tmp_path / 'new.csv')
    assert Certificate.from_csv(tmp_path / 'new.csv') == plain
    # the columns of older files
    assert not {'label_noise', 'test_sigma', 'n_train'} & {*pd.read_csv(tmp_path / 'new.csv')}
    assert {'label_noise', 'test_sigma', 'n_train'} <= {*pd.read_csv(tmp_path / 'c.csv')}
    text = (tmp_path / 'c.csv').read_text()
    for good, bad in ((',0.6,', ',0.7,'), (',0.25,', ',-1.0,'), (',0.25,', ',nan,'), (',400,', ',-3,'),
                      (',0.6,', ',x,')):
        (tmp_path / 'bad.csv').write_text(text.replace(good, bad))
        with pytest.raises(ValueError, match='bad.csv, line 2'):
            Certificate.from_csv(tmp_path / 'bad.csv')


class Foreign:
    norm = 'l2'
    def radius(self, p_a, p_b): return p_a - p_b


@pytest.mark.parametrize('noise, reach, word', [
    (GaussianNoise(1.), dict(label_noise=2 / 3), 'label_noise'),
    (GaussianNoise(1.), dict(label_noise=-.1), 'label_noise'),
    (GaussianNoise(1.), dict(label_noise=np.nan), 'label_noise'),
    (GaussianNoise(1.), dict(label_noise='.1'), 'label_noise'),
    (GaussianNoise(1.), dict(label_noise=True), 'label_noise'),
    (GaussianNoise(1.), dict(test_sigma=-.1), 'test_sigma'),
    (GaussianNoise(1.), dict(test_sigma=np.inf), 'test_sigma'),
    (GaussianNoise(1.), dict(test_sigma=[.1]), 'test_sigma'),
    (LaplaceNoise(1.), dict(test_sigma=.1), 'Gaussian'),
    (UniformNoise(0, 1), dict(test_sigma=.1), 'Gaussian'),
    (GaussianNoise(1.), dict(n_train=0), 'n_train'), (GaussianNoise(1.), dict(n_train=2.5), 'n_train'),
    (Foreign(), dict(label_noise=.1), 'works with GaussianNoise')])
def test_refused(noise, reach, word):
    with pytest.raises(ValueError, match=word):
        certify(OUTPUTS, noise, .01, **reach)


def test_refused_questions():
    c = certify(OUTPUTS, GaussianNoise(1.), .01, label_noise=.6, n_train=50)
    for r in (-1, 1.5, 51, np.nan, 'x'):
        with pytest.raises(ValueError, match='n_relabelled'):
            c.radius_with(r)
    for arguments in ((51, .1, True), (1, .1, -2), (1, -.1, True), (0, .1, True)):
        with pytest.raises(ValueError):
            c.covers(*arguments)
    with pytest.raises(ValueError, match='total_norms'):
        c.budget_map([0], [-1.])
    for r in ([51], [-1], [0, 1.5]):
        with pytest.raises(ValueError, match='n_relabelled'):
            c.budget_map(r, [.1])
    with pytest.raises(ValueError, match='hash'):
        c.covers(1, .1, test_norm=1e-9)
    with pytest.raises(ValueError, match='classes'):
        exact_certificate([0], [.99], [.01], GaussianNoise(1.), label_noise=.4).covers(1, 0, True)
    with pytest.raises(ValueError, match='d=784'):
        certify(OUTPUTS, UniformNoise(0, 1), .01, label_noise=.6).radius_with(1)


def test_abstentions_are_never_covered():
    c = certify(np.full((500, 2, 2), .5), GaussianNoise(1.), label_noise=.4, test_sigma=1.)
    assert (c.prediction == -1).all() and not c.covers(1, 0.).any() and not c.covers(1, 0., True, .1).any()
    assert np.isnan(c.radius_with(1)).all()
    assert (c.radius_with(0) == 0).all()
    assert (c.budget_map([0, 3], [0.]) == 0).all()


def test_certain_votes_far_out():
    "Logarithms of the tails are used: p_A = 1 in float64 with 1 - p_A = exp(-200)"
    c = exact_certificate([0], [1.], [0.], GaussianNoise(1.), [-200.], [-200.], classes=2, label_noise=.4985)
    assert 0 < c.radius_with(100_000)[0] < c.radius_with(1000)[0] < c.radius[0] < np.inf


@pytest.mark.parametrize('reach, inside, outside', [
    ({}, [], ['neither label flips', 'change of the test input']),
    (dict(label_noise=.4), ['put right', 'wrong labels'],
     ['neither insertions, deletions nor a change of the test input']),
    (dict(test_sigma=.3), ['without its mark'], ['neither label flips, insertions nor deletions']),
    (dict(label_noise=.4, test_sigma=.3), ['put right', 'without its mark'],
     ['neither insertions nor deletions.'])])
def test_words(reach, inside, outside):
    c = certify(np.tile([[.02, .98]], (900, 1, 1)), GaussianNoise(1.), **reach)
    text = c.explain(0)
    assert all(w in text for w in inside + outside)
    assert (not reach or all(f'{k}={v}' in repr(c) for k, v in reach.items()))
