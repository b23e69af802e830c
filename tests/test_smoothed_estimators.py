"""Ensembles of scikit-learn classifiers: their own checks, seeds, interrupts, refusals, class means,
certificates.

The checks that are not passed are listed with the reason, as in `test_estimators.py`."""
import pickle
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import BaggingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from rab_nb import estimators
from rab_nb.training import TrainSpec, noisy_labels
from rab_nb.estimators import SmoothedEnsembleClassifier, _class_means, seeded
from rab_nb.noise import GaussianNoise, LaplaceNoise, UniformNoise

pytestmark = pytest.mark.filterwarnings('ignore')
X, Y = np.r_[np.random.default_rng(0).normal(-1, 1, (30, 3)),
             np.random.default_rng(1).normal(1, 1, (30, 3))], np.repeat([0, 1], 30)


def ensemble(estimator=None, n=6, noise=GaussianNoise(.5), **settings):
    return SmoothedEnsembleClassifier(NearestCentroid() if estimator is None else estimator, noise, n,
                                      n_jobs=1, **settings)


@parametrize_with_checks([ensemble(NearestCentroid(), 12, GaussianNoise(.1)),
                          ensemble(LogisticRegression(), 3, GaussianNoise(.1))])
def test_check_estimator(estimator, check): check(estimator)


@pytest.mark.parametrize('base',
                         [LinearSVC(), LogisticRegression(), RidgeClassifier(), NearestCentroid(),
                          NearestCentroid(metric='manhattan'),
                          DecisionTreeClassifier(), make_pipeline(StandardScaler(), LinearSVC()),
                          BaggingClassifier(DecisionTreeClassifier(), 2)], ids=lambda e: str(e)[:30])
def test_every_learner(base):
    clf = ensemble(base, 12, label_noise=.1, test_sigma=.2).fit(X, np.array(['n', 'p'])[Y])
    p = clf.model_probabilities(X)
    assert p.shape == (12, 60, 2) and np.allclose(p.sum(2), 1) and clf.score(X, np.array(['n', 'p'])[Y]) > .8
    if not hasattr(base, 'predict_proba') or type(base) is NearestCentroid and base.metric == 'euclidean':
        assert set(np.unique(p)) <= {0, 1}
    again = ensemble(base, 12, label_noise=.1, test_sigma=.2).fit(X, np.array(['n', 'p'])[Y])
    np.testing.assert_array_equal(again.model_probabilities(X), p)
    other = ensemble(base, 12, label_noise=.1, test_sigma=.2, random_state=1).fit(X, np.array(['n', 'p'])[Y])
    assert (other.model_probabilities(X) != p).any()
    c = clf.certify(X, .2)
    assert (c.label_noise, c.test_sigma, c.n_train) == (.1, .2, 60)
    assert set(c.labels.tolist()) <= {'n', 'p', None}


def test_nested_seeds_come_from_the_stream():
    base = BaggingClassifier(DecisionTreeClassifier(splitter='random'), 3)
    one, two, three = (seeded(base, s, k) for s, k in ((0, 0), (0, 1), (0, 0)))
    for name in ('random_state', 'estimator__random_state'):
        assert one.get_params()[name] == three.get_params()[name] != two.get_params()[name]
    assert len({one.get_params()[n] for n in ('random_state', 'estimator__random_state')}) == 2
    assert base.random_state is None


@pytest.mark.parametrize('sigma, flip, classes', [(1., .4, 2), (.3, .6, 3), (2., 0., 2)])
def test_class_means_have_the_law_of_noisy_training_sets(sigma, flip, classes):
    """Against means of rows that were really drawn with NumPy's generator: Kolmogorov and Smirnov, every
    class and entry"""
    g, n, m = np.random.default_rng(0), 30, 3000
    x, y = g.normal(size=(n, 2)) * [1, 5], g.integers(classes, size=n)
    means = _class_means(TrainSpec(clone, GaussianNoise(sigma), classes, label_noise=flip), x, y, range(m))
    ours = np.full((m, classes, 2), np.nan)
    for k in range(m):
        labels = np.where(g.random(n) < flip, (y + g.integers(1, classes, n)) % classes, y)
        noisy = x + sigma * g.normal(size=x.shape)
        for c in range(classes):
            ours[k, c] = noisy[labels == c].mean(0) if (labels == c).any() else np.nan
    for c in range(classes):
        for j in range(2):
            assert stats.ks_2samp(means[:, c, j], ours[:, c, j], nan_policy='omit').pvalue > 1e-4
    if not flip: return
    a, b = means[:, 0, 0], means[:, 1, 0] # classes move together with the labels
    assert abs(np.corrcoef(a, b)[0, 1] - np.corrcoef(ours[:, 0, 0], ours[:, 1, 0])[0, 1]) < 4 * np.sqrt(2 / m)


def test_class_means_by_hand():
    "Without noise on the features to speak of, model k's means are those of its noisy labels"
    spec = TrainSpec(clone, GaussianNoise(1e-9), 2, label_noise=.3)
    means = _class_means(spec, X, Y, range(40, 90))
    import torch
    for k in (40, 77):
        labels = noisy_labels(spec, torch.from_numpy(Y), k).numpy()
        for c in (0, 1):
            np.testing.assert_allclose(means[k - 40, c], X[labels == c].mean(0), atol=1e-8)


def test_closed_form_only_where_it_holds():
    for base, noise, closed in [(NearestCentroid(), GaussianNoise(1.), True),
                                (NearestCentroid(), LaplaceNoise(1.), False),
                                (NearestCentroid(), UniformNoise(-1, 1), False),
                                (NearestCentroid(shrink_threshold=.1), GaussianNoise(1.), False),
                                (NearestCentroid(metric='manhattan'), GaussianNoise(1.), False),
                                (NearestCentroid(priors='empirical'), GaussianNoise(1.), False),
                                (LinearSVC(), GaussianNoise(1.), False)]:
        assert estimators.is_plain_centroid(base, noise) == closed


def test_both_ways_agree_about_the_smoothed_classifier():
    points = X[::6] * .3
    shares = [ensemble(NearestCentroid(), 1500, GaussianNoise(1.), label_noise=.35, test_sigma=.4,
                       closed_form=c).fit(X, Y)
              .model_probabilities(points).argmax(2).mean(0) for c in (True, False)]
    assert (abs(shares[0] - shares[1]) < 4 * np.sqrt(.5 / 1500)).all()
    assert .1 < shares[0].min() < shares[0].max() < .98


def test_an_offset_is_no_problem_for_class_means():
    near, far = (ensemble(NearestCentroid(), 50, label_noise=.2).fit(X + c, Y).model_probabilities(X + c)
                 for c in (0., 1e6))
    assert (near == far).mean() > .999


def test_a_model_that_meets_one_class():
    "Four rows and heavy label noise: some noisy training sets have one class; their models vote for it"
    x, y = np.array([[0.], [1.], [5.], [6.]]), np.array([0, 0, 1, 1])
    for base in (LinearSVC(), NearestCentroid()):
        clf = ensemble(base, 200, label_noise=.45).fit(x, y)
        p = clf.model_probabilities(x)
        assert np.allclose(p.sum(2), 1) and (p == p[:, :1]).all((1, 2)).sum() > 5


class Breaks(DecisionTreeClassifier):
    def fit(self, X, y):
        if X[0, 0] > -1: raise RuntimeError('no such luck')
        return super().fit(X, y)


class Stops(DecisionTreeClassifier):
    fits, at = 0, 4
    def fit(self, X, y):
        Stops.fits += 1
        if Stops.fits == Stops.at: raise KeyboardInterrupt
        return super().fit(X, y)


def test_failures_name_the_model():
    with pytest.raises(ValueError, match=r'model \d+, Breaks.*no such luck'):
        ensemble(Breaks(), 50).fit(X, Y)


@pytest.mark.parametrize('base', [Stops(), NearestCentroid()], ids=['clones', 'means'])
def test_interrupt_and_resume(base, monkeypatch):
    Stops.fits, calls = 0, []
    means = estimators._class_means
    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return means(*arguments)
    monkeypatch.setattr(estimators, '_class_means', interrupted)
    n, finished = (6, 3) if isinstance(base, Stops) else (170, 100)
    clf = ensemble(base, n, warm_start=True)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(X, Y)
    with pytest.warns(UserWarning, match=f'{finished} models answer'):
        part = clf.model_probabilities(X)
    assert part.shape[0] == finished
    whole = clf.fit(X, Y).model_probabilities(X)
    assert len(whole) == n
    assert (whole[:finished] == part).all()
    assert len(calls) in (0, 5)
    assert Stops.fits in (0, 7)
    np.testing.assert_array_equal(ensemble(clone(base), n).fit(X, Y).model_probabilities(X), whole)


def test_warm_start_keeps_nothing_of_other_data_or_settings():
    clf = ensemble(NearestCentroid(), 60, warm_start=True).fit(X, Y)
    for change in (dict(label_noise=.2), dict(random_state=3), dict(noise=GaussianNoise(.7)),
                   dict(estimator=LogisticRegression())):
        clf.set_params(**change).fit(X, Y)
        fresh = ensemble(clone(clf.estimator), 60, clf.noise, label_noise=clf.label_noise,
                         random_state=clf.random_state).fit(X, Y)
        np.testing.assert_array_equal(clf.model_probabilities(X), fresh.model_probabilities(X))
    fewer = clf.set_params(n_estimators=7).model_probabilities(X)
    assert len(fewer) == 7
    assert (clf.fit(X[::-1], Y[::-1]).model_probabilities(X) != fewer).any()


def test_workers_change_nothing():
    one = ensemble(LogisticRegression(), 4).fit(X, Y)
    two = SmoothedEnsembleClassifier(LogisticRegression(), GaussianNoise(.5), 4, n_jobs=2).fit(X, Y)
    np.testing.assert_array_equal(one.model_probabilities(X), two.model_probabilities(X))


def test_pickle_and_images():
    clf = ensemble(NearestCentroid(), 20).fit(X.reshape(60, 1, 3, 1), Y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(clf)).model_probabilities(X.reshape(60, 1, 3, 1)),
                                  ensemble(NearestCentroid(), 20).fit(X, Y).model_probabilities(X))


def test_three_classes_and_their_radii():
    x, y = load_iris(return_X_y=True)
    clf = ensemble(NearestCentroid(), 400, GaussianNoise(.5), label_noise=.5, test_sigma=.3).fit(x, y)
    c = clf.certify(x, bound='clopper_pearson', votes='hard')
    assert 0 < c.covers(2, .1, relabelled=True, test_norm=.1).mean() < c.covers(2, .1).mean()
    sure = c.prediction >= 0
    np.testing.assert_array_equal(c.radius_with(4)[sure],
                                  GaussianNoise(.5).relabelled_radius(c.p_a, c.p_b, .5, 4, 3)[sure])


@pytest.mark.parametrize('settings, word', [
    (dict(label_noise=.5), 'label_noise'), (dict(label_noise=-.1), 'label_noise'),
    (dict(n_estimators=0), 'n_estimators'), (dict(n_estimators=2.5), 'n_estimators'),
    (dict(n_estimators=True), 'n_estimators'), (dict(test_sigma=-1.), 'test_sigma'),
    (dict(noise=1.), 'noise'), (dict(random_state=None), 'random_state'),
    (dict(estimator=LinearRegression()), 'classifier'), (dict(estimator=LinearSVC), 'LinearSVC'),
    (dict(estimator=3), 'scikit-learn'), (dict(estimator=StandardScaler()), 'classifier')])
def test_refusals(settings, word):
    clf = ensemble().fit(X, Y)
    with pytest.raises(ValueError, match=word):
        clf.set_params(**settings).fit(X, Y)


def test_what_was_fitted_before_is_warned_about():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        ensemble(make_pipeline(FrozenEstimator(StandardScaler().fit(X)), LinearSVC()), 2).fit(X, Y)
    assert any('fitted beforehand' in str(w.message) for w in caught)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        ensemble(make_pipeline(StandardScaler(), LinearSVC()), 2).fit(X, Y)
    assert not any('fitted beforehand' in str(w.message) for w in caught)


class Unseeded(DecisionTreeClassifier):
    "Draws from a generator that nobody can set"
    def fit(self, X, y):
        rows = np.random.default_rng().choice(len(X), len(X) // 3)
        return super().fit(X[rows], y[rows])


def test_an_estimator_without_a_seed_is_allowed():
    "Its draws are independent of the data, so certificates hold; its votes cannot be repeated"
    one, two = (ensemble(Unseeded(), 40, label_noise=.1).fit(X, Y) for _ in range(2))
    assert (one.model_probabilities(X) != two.model_probabilities(X)).any()
    c = one.certify(X, .05)
    assert c.label_noise == .1 and (c.prediction >= 0).mean() > .5
    trained = ensemble(DummyClassifier(strategy='uniform'), 30).fit(X, Y)
    assert trained.model_probabilities(X).shape == (30, 60, 2)


class Remembers(StandardScaler):
    seen = []
    def fit(self, X, y=None, sample_weight=None):
        Remembers.seen.append(np.array(X))
        return super().fit(X)


def test_preprocessing_sees_the_noisy_rows_of_its_own_model():
    Remembers.seen.clear()
    ensemble(make_pipeline(Remembers(), LinearSVC()), 3).fit(X, Y)
    assert len(Remembers.seen) == 3
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (Remembers.seen[a] != Remembers.seen[b]).all()
    for seen in Remembers.seen:
        assert .3 < (seen - X).std() < .7 # sigma is .5


def quiet(base):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        ensemble(base, 2).fit(X, Y)
    return not any('fitted beforehand' in str(w.message) for w in caught)


def halved(x): return x / 2


def test_constants_are_no_preprocessing_that_was_fitted():
    assert quiet(make_pipeline(FunctionTransformer(halved), LinearSVC()))


WRAPPED = dict(pipeline=lambda f: make_pipeline(make_pipeline(f), LinearSVC()),
               union=lambda f: make_pipeline(make_union(f, StandardScaler()), LinearSVC()),
               columns=lambda f: make_pipeline(make_column_transformer((f, slice(3))), LinearSVC()),
               bagging=lambda f: BaggingClassifier(make_pipeline(f, LinearSVC()), 2))


@pytest.mark.parametrize('name', WRAPPED)
def test_what_was_fitted_before_is_found_in_depth(name):
    wrap, scaler = WRAPPED[name], StandardScaler()
    assert not quiet(wrap(FrozenEstimator(clone(scaler).fit(X)))) and quiet(wrap(scaler))
