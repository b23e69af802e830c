"Exact neighbours with label noise: enumeration of all labels, a law by brute force, and what is refused."
import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, ncx2

from rab_nb.knn import SmoothedKNNClassifier, noisy_shares, with_label_noise
from rab_nb.theory import relabelled_radius


def points(seed, n, d, n_classes):
    g = np.random.default_rng(seed)
    y = np.r_[np.arange(n_classes), g.integers(0, n_classes, n - n_classes)]
    return 1.5 * g.normal(size=(n, d)), y, g.normal(size=(3, d))


def averaged(x, y, at, k, sigma, flip, n_classes):
    "The classifier without label noise, asked about every outcome of the labels"
    out = np.zeros((len(at), n_classes))
    for labels in itertools.product(range(n_classes), repeat=len(y)):
        chance = math.prod(1 - flip if a == b else flip / (n_classes - 1) for a, b in zip(labels, y))
        knn = SmoothedKNNClassifier(k, sigma).fit(x, np.array(labels))
        out[:, knn.classes_] += chance * knn.predict_proba(at)
    return out


@pytest.mark.parametrize('n, k, flip, sigma', [
    (4, 1, .1, 1.), (4, 2, .45, .5), (5, 3, .3, 2.), (6, 4, .01, 1.), (5, 5, .2, .3)])
def test_two_classes_by_enumeration(n, k, flip, sigma):
    x, y, at = points(n + k, n, 3, 2)
    found = with_label_noise(SmoothedKNNClassifier(k, sigma).fit(x, y), at, None, flip)
    assert np.allclose(np.exp(found[0]), averaged(x, y, at, k, sigma, flip, 2), rtol=0, atol=1e-9)
    assert np.allclose(np.exp(found[0]).sum(1), 1, atol=1e-10) and (found[1] < 1e-8).all()


@pytest.mark.parametrize('n_classes, flip', [(3, .3), (4, .7)])
def test_one_neighbour_of_many_classes_by_enumeration(n_classes, flip):
    x, y, at = points(n_classes, n_classes, 2, n_classes)
    knn = SmoothedKNNClassifier(1, 1.).fit(x, y)
    found = np.exp(with_label_noise(knn, at, None, flip)[0])
    assert np.allclose(found, averaged(x, y, at, 1, 1., flip, n_classes), atol=1e-9)


def law_by_hand(x, y, t, k, sigma, radii):
    "Law of the votes for class 1 by one product over all rows, at many radii"
    s2 = ((x - t)**2).sum(1) / sigma**2
    inside = ncx2.cdf(radii[:, None]**2, x.shape[1], s2)
    rates = np.gradient(inside, radii, axis=0)
    votes = np.zeros((2, k + 1, k + 1, len(radii)))  # before one arrives, and with it; of class 0, 1
    votes[0, 0, 0] = 1
    for f, g, c in zip(inside.T, rates.T, y):
        step = (lambda v: np.roll(v, 1, c)) # the last row is dropped below
        cut = votes.copy()
        cut[(slice(None), k) if c == 0 else (slice(None), slice(None), k)] = 0
        votes = np.stack([votes[0] * (1 - f) + step(cut[0]) * f,
                          votes[1] * (1 - f) + step(cut[1]) * f + step(cut[0]) * g])
    return np.array([np.trapezoid(votes[1, k - j, j], radii) for j in range(k + 1)])


@pytest.mark.parametrize('n, d, k, sigma', [(40, 3, 5, 1.), (60, 8, 6, .7)])
def test_the_law_of_the_votes_by_brute_force(n, d, k, sigma):
    x, y, at = points(n, n, d, 2)
    knn = SmoothedKNNClassifier(k, sigma).fit(x, y)
    radii = np.linspace(1e-6, 20, 1601)
    for flip in (.05, .4):
        found = np.exp(with_label_noise(knn, at, None, flip)[0])
        for t, p in zip(at, found):
            law = law_by_hand(x, y, t, k, sigma, radii)
            assert abs(law.sum() - 1) < 1e-3
            assert np.allclose(noisy_shares(k, flip) @ law, p, atol=1e-3)


@pytest.mark.parametrize('k', [1, 2, 5, 8])
def test_shares_of_noisy_votes(k):
    for j, flip in itertools.product(range(k + 1), (.01, .3, .499)):
        clean = np.arange(k) < j
        won = sum(math.prod(1 - flip if a == b else flip for a, b in zip(v, clean))
                  for v in itertools.product((0, 1), repeat=k) if sum(v) > k // 2)
        assert noisy_shares(k, flip)[:, j] == pytest.approx([1 - won, won], rel=1e-11)


def test_rare_losses_keep_their_digits():
    "All of the nearest are of one class, so that the rival needs a majority of wrong labels"
    x = np.r_[np.zeros((60, 2)), np.full((60, 2), 80.)]
    knn = SmoothedKNNClassifier(41, 1.).fit(x, np.repeat([0, 1], 60))
    found = knn.certify(np.zeros((1, 2)), label_noise=.01)
    q = binom.sf(20, 41, .01)
    assert found.log_q_a[0] == pytest.approx(math.log(q), abs=1e-6) and q < 1e-25
    radius = relabelled_radius(1., 1., .01, 3, log_q_a=found.log_q_a[0])
    assert found.radius_with(3)[0] == pytest.approx(radius, rel=1e-9)


def test_without_label_noise_nothing_changes():
    x, y, at = points(0, 30, 2, 3)
    knn = SmoothedKNNClassifier(5).fit(x, y)
    plain, zero = knn.certify(at), knn.certify(at, label_noise=0.)
    assert (plain.radius == zero.radius).all() and np.isnan(zero.radius_with(1)).all()
    assert (plain.covers(1, 1e-6, relabelled=1) == False).all()  # noqa: E712


def test_distances_may_be_given():
    x, y, at = points(1, 50, 4, 2)
    knn = SmoothedKNNClassifier(7, .8).fit(x, y)
    one, two = knn.certify(at, label_noise=.2), knn.certify(at, knn.distances(at), label_noise=.2)
    assert np.allclose(one.radius_with(1), two.radius_with(1), equal_nan=True)


@pytest.mark.parametrize('k, n_classes, flip, word', [
    (1, 2, .5, 'flip'), (1, 3, .7, 'flip'), (3, 2, -.1, 'flip'), (3, 2, float('nan'), 'flip'),
    (3, 3, .1, 'two classes'), (1, 2, '0.1', 'label_noise'), (1, 2, [.1], 'label_noise'),
    (1, 2, True, 'label_noise'), (1, 1, .1, 'one')])
def test_refused(k, n_classes, flip, word):
    x, y, at = points(2, 20, 2, n_classes)
    with pytest.raises(ValueError, match=word):
        SmoothedKNNClassifier(k).fit(x, y).certify(at, label_noise=flip)
