"Bad input of everything that covers wrong labels and marked test inputs: right, or a ValueError that helps."
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, StandardScaler

from rab_nb import GaussianNoise, SmoothedEnsembleClassifier, certify
from rab_nb.theory import joint_norm, relabelled_radius

NAN, INF = float('nan'), float('inf')
G = np.random.default_rng(0)
X, Y = G.normal(size=(60, 4)) + 2 * (np.arange(60) % 2)[:, None], np.arange(60) % 2


def ensemble(estimator=NearestCentroid(), label_noise=.3, test_sigma=.5, n=40):
    return SmoothedEnsembleClassifier(estimator, GaussianNoise(1.), n, label_noise, test_sigma)


@pytest.fixture(scope='module')
def certificate(): return ensemble().fit(X, Y).certify(X[:3], alpha=.05)


@pytest.mark.parametrize('name, values', dict(
    flip=['a', None, True, 1j, [.1], -.1, 2/3, 1., NAN, INF], sigma=['a', None, -1., 0., NAN, INF, True],
    p_a=['a', None, NAN, -.1, 1.1, 1j, [.9, 'b']], p_b=['a', NAN, -.1, 2.],
    n_classes=[1, 0, -3, 2., '3', True, None],
    n_relabelled=[-1, 1.5, 'a', None, True, NAN, INF, [0, -1], 10**9], log_q_a=['a', .1, NAN],
    log_p_b=['a', .1, NAN]).items())
def test_relabelled_radius(name, values):
    usual = dict(p_a=.95, sigma=1., flip=.4, n_relabelled=2, n_classes=3, p_b=.01)
    assert relabelled_radius(**usual) > 1
    for value in values:
        with pytest.raises(ValueError, match=name):
            relabelled_radius(**usual | {name: value})


@pytest.mark.parametrize('change', [
    dict(p_a=.01, p_b=.01), dict(p_a=.3, p_b=.4), dict(p_b=.99), dict(flip=0.), dict(p_a=.5, p_b=.5)])
def test_what_is_lost_or_not_covered_is_nan(change):
    usual = dict(p_a=.95, sigma=1., flip=.4, n_relabelled=2, n_classes=3, p_b=.01)
    assert np.isnan(relabelled_radius(**usual | change))


@pytest.mark.parametrize('arguments', [
    (['a'], 1.), ([1.], 'a'), ([1.], None), ([1.], 1., 'a', 1.), ([1.], 1., .1, 'a'), ([1.], [1., 2.]),
    (None, 1.), ([1.], 1., NAN, 1.), ([INF], 1.)])
def test_joint_norm(arguments):
    with pytest.raises(ValueError):
        joint_norm(*arguments)


@pytest.mark.parametrize('bad', [.5, .6, -.1, NAN, 'a', None, True, [.1]])
def test_label_noise(bad):
    with pytest.raises(ValueError, match='label_noise'):
        ensemble(label_noise=bad).fit(X, Y)
    with pytest.raises(ValueError, match='label_noise'):
        certify(np.tile([[.9, .1]], (20, 1, 1)), GaussianNoise(1.), label_noise=bad)


@pytest.mark.parametrize('bad', [-1., NAN, INF, 'a', True])
def test_test_sigma(bad):
    with pytest.raises(ValueError, match='test_sigma'):
        ensemble(test_sigma=bad).fit(X, Y)


@pytest.mark.parametrize('bad', [-1, 61, 1.5, '2', None, NAN, [0, 61]])
def test_rows_beyond_the_training_set(certificate, bad):
    with pytest.raises(ValueError, match='n_relabelled|whole numbers'):
        certificate.radius_with(bad)
    with pytest.raises(ValueError, match='n_relabelled|whole numbers'):
        certificate.covers(3, .1, relabelled=bad)


@pytest.mark.parametrize('change', [
    dict(test_norm=-1.), dict(test_norm=NAN), dict(test_norm='a'), dict(test_norm=None),
    dict(pattern_norm=NAN), dict(pattern_norm="a"), dict(n_poisoned=0), dict(n_poisoned=2.5),
    dict(n_poisoned=61)])
def test_covers(certificate, change):
    with pytest.raises(ValueError, match=next(iter(change)) + '|n_relabelled'):
        certificate.covers(**dict(n_poisoned=3, pattern_norm=.1, relabelled=True) | change)


def told(estimator, x=X):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        ensemble(estimator, n=3).fit(x, Y).predict(x[:2])
    return [str(w.message) for w in found]


def test_preprocessing_that_was_fitted_before_the_noise_is_told():
    scaler = StandardScaler().fit(X)
    for step in (FrozenEstimator(scaler), FunctionTransformer(scaler.transform)):
        assert 'fitted beforehand' in told(make_pipeline(step, LogisticRegression()))[0]
    scaled = scaler.transform(X)
    for x in (scaled, scaled.astype(np.float32), np.c_[scaled, np.zeros(60)]):
        assert 'mean 0' in told(NearestCentroid(), x)[0]


def test_preprocessing_inside_of_the_clone_or_by_constants_is_fine():
    for step in (StandardScaler(), StandardScaler().fit(X), MinMaxScaler(), FunctionTransformer(np.tanh)):
        assert not told(make_pipeline(step, LogisticRegression()))
    assert not told(NearestCentroid(), X / 3 - .5)
    assert not told(NearestCentroid(), np.r_[X[:30], -X[:30]])  # mean 0, and a spread of its own


class Unseeded(LogisticRegression):
    "Draws from the global generator, whatever random_state is"
    def fit(self, X, y): return super().fit(X[np.random.permutation(len(X))[:50]], y[:50])


def test_randomness_that_cannot_be_seeded_is_allowed():
    assert not told(Unseeded()) and ensemble(Unseeded()).fit(X, Y).certify(X[:2]).radius.shape == (2,)


class Picky(NearestCentroid):
    def fit(self, X, y):
        if len(np.unique(y)) < 2: raise ValueError('one class only')
        return super().fit(X, y)


def test_a_clone_that_meets_one_class_votes_for_it_and_other_failures_name_the_model():
    few = ensemble(Picky(), label_noise=.45, n=60).fit(X[:4], [0, 0, 0, 1])
    assert few.model_probabilities(X[:2]).shape == (60, 2, 2)
    broken = clone(LogisticRegression()).set_params(C=-1.)
    with pytest.raises(ValueError, match='model 0'):
        ensemble(broken).fit(X, Y)
