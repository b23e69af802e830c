"Properties of radii and of condition (12) on random inputs, and ensembles smoothed with every noise."
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import linprog

from rab_nb import data, models, theory
from rab_nb.ensemble import RABClassifier
from rab_nb.noise import GaussianNoise, LaplaceNoise, UniformNoise, noise_from_repr

check = settings(derandomize=True, deadline=None, max_examples=300, database=None)
probability = st.one_of(st.floats(0, 1), st.sampled_from([0., 5e-324, 1e-300, 1e-17, .5, 1 - 2**-53, 1.]))
scale = st.floats(1e-3, 1e3)
RADII = {'gaussian': lambda a, b, s: theory.gaussian_radius(a, b, s),
         'laplace': lambda a, b, s: theory.laplace_radius(a, b, s),
         'linf': lambda a, b, s: theory.uniform_linf_radius(a, b, 0, s, 7, 3),
         'l1': lambda a, b, s: theory.uniform_l1_radius(a, b, 0, s)}


@pytest.mark.parametrize('radius', RADII.values(), ids=RADII)
@check
@given(probability, probability, probability, scale)
def test_radius_is_zero_finite_and_monotone(radius, a, b, c, s):
    value = radius(a, b, s)
    assert value >= 0 and not np.isnan(value)
    assert radius(a, a, s) == 0
    if a <= b:
        assert value == 0
    assert radius(max(a, c), b, s) >= value * (1 - 1e-12)
    assert radius(a, min(b, c), s) >= value * (1 - 1e-12)
    assert radius(a, b, 2 * s) == pytest.approx(2 * value, rel=1e-12)


@pytest.mark.parametrize('radius', RADII.values(), ids=RADII)
def test_radius_of_arrays_is_that_of_numbers(radius):
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 40)), rng.random(40)
    table = radius(a, b, 1.5)
    assert table.shape == (3, 40)
    assert (table == [[radius(v, w, 1.5) for v, w in zip(row, b)] for row in a]).all()


@pytest.mark.parametrize('bad', [-1e-9, 1 + 1e-9, np.nan, np.inf])
@pytest.mark.parametrize('radius', RADII.values(), ids=RADII)
def test_radius_refuses_what_is_no_probability(radius, bad):
    with pytest.raises(ValueError, match=r'\[0, 1\]'):
        radius(bad, .1, 1.)
    with pytest.raises(ValueError, match=r'\[0, 1\]'):
        radius([.9, .9], [.1, bad], 1.)


def quantile(log_tail):
    "ppf of exp(log_tail) in 60 digits, by Newton's method on the logarithm."
    mpmath.mp.dps = 60
    log_tail = mpmath.mpf(float(log_tail))
    z = -mpmath.sqrt(-2 * log_tail)
    for _ in range(60):
        cdf = mpmath.ncdf(z)
        z -= (mpmath.log(cdf) - log_tail) * cdf / mpmath.npdf(z)
    return z


@settings(check, max_examples=60)
@given(st.floats(-690, -.7), st.floats(-690, -.7))
def test_gaussian_radius_in_the_tails(log_q_a, log_p_b):
    exact = float((-quantile(log_q_a) - quantile(log_p_b)) / 2)
    value = theory.gaussian_radius(-np.expm1(log_q_a), np.exp(log_p_b), 1., log_q_a=log_q_a, log_p_b=log_p_b)
    assert value == pytest.approx(exact, rel=1e-12)


@check
@given(st.floats(.02, .98), st.floats(-14, -1))
def test_gaussian_radius_of_close_votes(p_b, log10_gap):
    p_a = min(p_b + 10**log10_gap, 1.)
    inverse = lambda p: mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(float(p)) - 1)
    mpmath.mp.dps = 40
    if p_a < 1:
        assert theory.gaussian_radius(p_a, p_b,
                                      2.) == pytest.approx(float(inverse(p_a) - inverse(p_b)), rel=2e-12)


numbers = st.floats(0, 1).map(lambda v: round(v, 3))
law = lambda k: st.lists(numbers, min_size=k, max_size=k).filter(any)
masses = st.integers(2, 6).flatmap(lambda k: st.tuples(law(k), law(k)))


@settings(check, max_examples=100)
@given(masses, st.floats(0, 1), st.floats(0, 1))
def test_condition_is_what_a_linear_program_finds(pair, u, v):
    eps, delta = (np.array(m) / sum(m) for m in pair)
    p_a, p_b = max(u, 1 - u), min(u, 1 - u) * v
    k, none = len(eps), np.zeros(len(eps))
    limits = np.vstack([np.r_[-eps, none], np.r_[none, eps], np.hstack([np.eye(k)] * 2)])
    worst = linprog(np.r_[delta, -delta], limits, [-p_a, p_b, *np.ones(k)], bounds=(0, 1)).fun
    margin, error = theory.condition_margin(eps, delta, p_a, p_b)
    assert 0 < error < 1e-13 and margin == pytest.approx(worst, abs=1e-6)


PAIRS = {'norm': (stats.norm(.8), stats.norm()), 'far': (stats.norm(5), stats.norm()),
         'uniform': (stats.uniform(.37, 2), stats.uniform(0, 2)),
         'laplace': (stats.laplace(1.3), stats.laplace()),
         'two norm': [theory.Product([stats.norm(k * .5), stats.norm(k * -1.2)]) for k in (1, 0)],
         'boxes': [theory.Product([stats.uniform(k * .1), stats.uniform(k * -.3)]) for k in (1, 0)]}


@pytest.mark.parametrize('pair', PAIRS.values(), ids=PAIRS)
def test_cells_agree_with_closed_forms_within_their_error(pair):
    p = np.r_[0, 1e-9, 1e-4, np.linspace(.001, .999, 200), 1 - 1e-4, 1]
    exact, zero = theory.least_vote(*pair, p)
    value, error = theory.least_vote(*pair, p, numerical=True)
    assert (zero == 0).all() and (np.abs(value - exact) <= error + 1e-9).all() and error[:-1].max() < 2e-5


upper = lambda law, p: law.isf(p / 2)
ORACLES = {'expon': (stats.expon(), stats.expon(scale=2), lambda e, d, p: d.cdf(e.ppf(p))),
           'beta': (stats.beta(2, 3), stats.beta(3, 2), lambda e, d, p: d.cdf(e.ppf(p))),
           'lognorm': (stats.lognorm(1), stats.lognorm(1, scale=2), lambda e, d, p: d.cdf(e.ppf(p))),
           'wider': (stats.norm(), stats.norm(0, 2), lambda e, d, p: 2 * d.cdf(e.ppf((1 + p) / 2)) - 1),
           'narrower': (stats.norm(), stats.norm(0, 1e-3), lambda e, d, p: 2 * d.sf(upper(e, p))),
           'needle': (stats.norm(), stats.norm(0, 1e-8), lambda e, d, p: 2 * d.sf(upper(e, p))),
           'moved expon': (stats.expon(.2), stats.expon(), lambda e, d, p: p * np.exp(-.2)),
           'inside': (stats.uniform(0, 1), stats.uniform(.5, 1e-3),
                      lambda e, d, p: np.maximum(p - .999, 0) / 1e-3),
           'poisson': (stats.poisson(3), stats.poisson(4),
                       lambda e, d, p: np.interp(p, e.cdf(np.arange(-1, 60)), d.cdf(np.arange(-1, 60))))}


@pytest.mark.parametrize('eps, delta, oracle', ORACLES.values(), ids=ORACLES)
def test_level_sets_that_are_known(eps, delta, oracle):
    p = np.array([1e-6, .01, .3, .7, .99, .99999])
    value, error = theory.least_vote(eps, delta, p)
    assert (np.abs(value - oracle(eps, delta, p)) <= error + 1e-9).all() and error.max() < 1e-5


def test_laws_of_any_kind():
    t = theory.least_vote(stats.t(3, .5), stats.t(3), [.2, .9])
    assert (t[1] < 1e-5).all() and (t[0] < [.2, .9]).all()
    mixed = theory.Product([stats.norm(.5),
                            stats.binom(10, .5)]), theory.Product([stats.norm(0), stats.binom(10, .4)])
    value, error = theory.least_vote(*mixed, [.2, .9])
    z = [np.stack([law.components[0].rvs(200_000, random_state=rng),
                   law.components[1].rvs(200_000, random_state=rng)])
         for law, rng in zip(mixed, map(np.random.default_rng, (0, 1)))]
    score = lambda z: -.5 * z[0] + z[1] * np.log(.4 / .6)
    for p, v, e in zip((.2, .9), value, error):
        assert abs((score(z[1]) <= np.quantile(score(z[0]), p)).mean() - v) < e + 4 * np.sqrt(.5 / 200_000)
    with pytest.raises(ValueError, match='components'):
        theory.least_vote(mixed[0], stats.norm(), .5)
    with pytest.raises(ValueError, match='are no laws'):
        theory.robustness_condition('a', stats.norm(), .9, .1)
    assert theory.robustness_condition(GaussianNoise(1.), LaplaceNoise(1.), .99, .01)


@check
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=30), probability, probability, st.floats(-2, 2),
       st.floats(.1, 5))
def test_uniform_condition_is_the_product_of_27(entries, p_a, p_b, low, width):
    product = np.prod([max(0, 1 - abs(v) / ((low + width) - low)) for v in entries])
    left = 1 - max(p_a - p_b, 0) / 2
    if abs(left - product) > 1e-9:
        assert theory.uniform_certifies(entries, p_a, p_b, low, low + width) == (left < product)


@check
@given(st.sampled_from([GaussianNoise, LaplaceNoise]), st.floats(1e-300, 1e300))
def test_noise_survives_its_repr(kind, value):
    assert noise_from_repr(repr(kind(value))) == kind(value)
    assert noise_from_repr(repr(UniformNoise(-value, value / 2))) == UniformNoise(-value, value / 2)


@pytest.mark.parametrize('text',
                         ['', 'GaussianNoise', 'GaussianNoise()', 'GaussianNoise(sigma=nan)',
                          'GaussianNoise(sigma=-1)', 'GaussianNoise(sigma=1, b=2)',
                          'UniformNoise(a=1, b=0)', 'Noise(sigma=1.0)',
                          'GaussianNoise(sigma=__import__("os"))'])
def test_no_noise_from_other_text(text):
    with pytest.raises(ValueError, match='is not the repr'):
        noise_from_repr(text)


@pytest.mark.parametrize('noise', [GaussianNoise(.5), UniformNoise(-.8, .8), LaplaceNoise(.3)],
                         ids=lambda noise: noise.norm)
def test_ensemble_with_any_noise_end_to_end(noise):
    task = data.load('digits', (0, 1))
    model = RABClassifier(models.digits_cnn, noise, n_estimators=40, epochs=12, lr=5e-3, device='cpu',
                          precision='float32').fit(task.x_train, task.y_train)
    certificate = model.certify(task.x_test, **({'d': 64, 'n_poisoned': 2} if noise.norm == 'linf' else {}))
    won = certificate.prediction >= 0
    assert won.mean() > .5
    assert (certificate.radius[won] > 0).all()
    assert (certificate.prediction[won] == task.y_test[won]).mean() > .9
    pattern = np.zeros((2, 64))
    pattern[:, 5] = .02
    assert noise.certifies(pattern, certificate.p_a, certificate.p_b)[won].mean() > .9
    entry = {'l2': .02, 'l1': .02, 'linf': .02}[noise.norm]
    covered = certificate.covers(2, entry)
    assert (covered <= noise.certifies(pattern, certificate.p_a, certificate.p_b)).all()
