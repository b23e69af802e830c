"""A random search over odd inputs: no certified radius may exceed that of an oracle; refusing with a reason
is an answer too."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from knn_oracles import exact_distances, radius, vote_by_leaving_one_out

from rab_nb.knn import SmoothedKNNClassifier

torch.set_num_threads(1)

REASONS = re.compile(r'sigma|rescale|n_neighbors|feature|row|add up')
inputs = dict(
    n=st.integers(1, 9),
    d=st.sampled_from([1, 2, 3, 5, 12, 40, 784]),
    n_classes=st.integers(1, 5),
    k=st.integers(1, 9),
    log_sigma=st.integers(-15, 15),
    spread=st.sampled_from([1e-9, 1e-3, 0.3, 1.0, 2.0, 4.0, 8.0, 20.0, 1e3, 1e7, 1e12]),
    copies=st.sampled_from(['none', 'none', 'some', 'all']),
    shares=st.sampled_from(['even', 'even', 'one against all']),
    outlier=st.sampled_from([0, 0, 0, 1e3, 1e9, 1e16, 1e20, 3.4e38]),
    entry=st.booleans(),
    offset=st.sampled_from([0, 0, 1e3, 1e8]),
    where=st.sampled_from(['among', 'among', 'at', 'beyond']),
    seed=st.integers(0, 9999),
)


def odd_input(n, d, n_classes, k, log_sigma, spread, copies, shares, outlier, entry, offset, where, seed):
    "Features, labels, test point, sigma and number of neighbours."
    rng, sigma = np.random.default_rng(seed), 10.**log_sigma
    x = rng.normal(size=(n, d)) * spread/np.sqrt(d)
    if copies == 'all': x[:] = x[0]
    elif copies == 'some': x = x[rng.integers(0, max(1, n//2), n)]
    t = rng.normal(size=d) * spread/np.sqrt(d)
    if where == 'at': t = x[rng.integers(n)].copy()
    elif where == 'beyond': t = t * 3 + spread
    x, t = (x + offset)*sigma, (t + offset)*sigma
    if outlier: x[rng.integers(n), rng.integers(d) if entry else slice(None)] = outlier
    y = rng.integers(0, n_classes, n) if shares == 'even' else np.arange(n) == rng.integers(n)
    return x, np.unique(y, return_inverse=True)[1], t, sigma, min(k, n)


def judged(x, y, t, sigma, k):
    "How the classifier did: refused, abstained, close or below."
    try: certificate = SmoothedKNNClassifier(k, sigma, n_jobs=1).fit(x, y).certify(t[None])
    except ValueError as e:
        assert REASONS.search(str(e)), e
        return 'refused'
    s, delta = exact_distances(x, t, sigma, k)
    p = vote_by_leaving_one_out(s, delta, y, y.max() + 1, x.shape[1], k)
    assert abs(p.sum() - 1) < 1e-9
    found, exact, top = certificate.radius[0], radius(p, sigma), certificate.prediction[0]
    if top < 0 or found == 0: return 'abstained'
    assert p[top] >= p.max()*(1 - 1e-9), f'class {top} is predicted, but the probabilities are {p}'
    assert found <= exact*(1 + 1e-9), f'radius {found/sigma} sigma instead of {exact/sigma}'
    return 'close' if found == exact or found >= exact - 1e-6*(exact + sigma) else 'below'


def search(examples):
    count = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(**inputs)
    def case(**drawn): count[judged(*odd_input(**drawn))] += 1
    case()
    return count


def test_no_radius_is_too_large():
    count = search(200)
    assert (
        sum(count.values()) >= 200
        and count['refused'] < 0.3 * count.total()
        and count['close'] > 0.5 * count.total()
    ), count


@pytest.mark.slow
def test_no_radius_is_too_large_in_thousands():
    count = search(5000)
    assert count['refused'] < .3*count.total() and count['close'] > .5*count.total(), count
