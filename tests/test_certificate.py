"Bounds and certificates: coverage by enumeration and simulation, properties, files."
import csv
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from rab_nb import bounds
from rab_nb.certificate import Certificate, VoteStatistics, certify, certify_statistics, exact_certificate
from rab_nb.knn import SmoothedKNNClassifier
from rab_nb.metrics import (abstention_rate, attack_success_rate, certified_accuracy, certified_rate,
                            clean_accuracy, constant_accuracy, prediction_accuracy)
from rab_nb.noise import GaussianNoise, LaplaceNoise, UniformNoise, rng

DRAWS = 20_000
LAWS = {'votes 0.5': (.5, lambda g, s: (g.random(s) < .5).astype(float)),
        'votes 0.9': (.9, lambda g, s: (g.random(s) < .9).astype(float)),
        'votes 0.98': (.98, lambda g, s: (g.random(s) < .98).astype(float)),
        'votes 0.999': (.999, lambda g, s: (g.random(s) < .999).astype(float)),
        'uniform': (.5, lambda g, s: g.random(s)),
        'soft 0.79': (.79, lambda g, s: g.beta(.79*7, .21*7, s)),
        'sure or not': (.94, lambda g, s: np.where(g.random(s) < .9, 1., .4)),
        'skewed': (.02, lambda g, s: g.beta(.02, .98, s))}


def normal(x, alpha):
    margin = stats.norm.isf(alpha)*x.std(0, ddof=1)/np.sqrt(len(x))
    return x.mean(0) - margin, x.mean(0) + margin


def allowed(alpha):
    return alpha + 4*np.sqrt(alpha*(1 - alpha)/DRAWS)


def misses(bound, law, n, alpha):
    p, draw = LAWS[law]
    low, high = bound(draw(rng(0, law, n), (n, DRAWS)), alpha)
    return (low > p).mean(), (high < p).mean()


def applicable(name, law):
    return name != 'clopper_pearson' or law.startswith('votes')


# Coverage ---------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('alpha, n', [(.05, 20), (.05, 100), (.001, 100), (.05, 1000)])
@pytest.mark.parametrize('name', bounds.BOUNDS)
def test_simulated_coverage(name, alpha, n):
    "Each side of each bound is wrong at most as often as it says: 20,000 ensembles for each law and size."
    worst = {law: max(misses(bounds.BOUNDS[name], law, n, alpha)) for law in LAWS if applicable(name, law)}
    assert max(worst.values()) <= allowed(alpha), worst


@pytest.mark.parametrize('alpha, n', [(.05, 100), (.01, 1000)])
def test_the_coverage_test_can_fail(alpha, n):
    "The textbook interval breaks the promise on votes near certainty, and the count shows it."
    assert max(misses(normal, 'votes 0.999', n, alpha)) > 2*allowed(alpha)


@pytest.mark.parametrize('n', [5, 40, 300])
@pytest.mark.parametrize('alpha', [.1, .001])
@pytest.mark.parametrize('name', ['hoeffding', 'empirical_bernstein', 'clopper_pearson'])
def test_exact_coverage_for_votes(name, n, alpha):
    "For votes the chance of a miss is a finite sum over the counts: no simulation, no tolerance."
    k, p = np.arange(n + 1), np.linspace(.001, .999, 499)[:, None]
    votes = (np.arange(n)[:, None] < k).astype(float)
    low, high = bounds.BOUNDS[name](votes, alpha)
    law = stats.binom.pmf(k, n, p)
    assert ((law*(low > p)).sum(1) <= alpha*(1 + 1e-9)).all()
    assert ((law*(high < p)).sum(1) <= alpha*(1 + 1e-9)).all()


def test_clopper_pearson_is_not_loose():
    "At the p where a count becomes just possible the miss probability is alpha itself."
    n, alpha = 60, .01
    for k in (1, 30, 59, 60):
        low = bounds.clopper_pearson_hits(n, k, alpha)[0]
        assert stats.binom.sf(k - 1, n, low) == pytest.approx(alpha, rel=1e-9)


@pytest.mark.parametrize('n_classes', [2, 3, 10])
@pytest.mark.parametrize('bound', ['clopper_pearson', 'betting'])
def test_simultaneous_statement_holds_without_signal(n_classes, bound):
    "The class is chosen on the same outputs; all its bounds still hold together with probability 1 - alpha."
    alpha, n, draws = .05, 120, 3000
    votes = rng(0, 'classes', n_classes).integers(n_classes, size=(n, draws))
    p = (votes[..., None] == np.arange(n_classes)).astype(float)
    cert = certify(p, GaussianNoise(1.), alpha, bound, 'hard')
    wrong = (cert.p_a > 1/n_classes) | (cert.p_b < 1/n_classes)
    assert wrong.mean() <= alpha + 4*np.sqrt(alpha*(1 - alpha)/draws)


@pytest.mark.parametrize('simultaneous, kept', [(True, True), (False, False)])
def test_only_the_corrected_certificates_of_a_tie_are_rare_enough(simultaneous, kept):
    "Two equal classes: every certificate is false, and alpha is promised."
    alpha, n, draws = .05, 1001, DRAWS
    ones = rng(0, 'tie').binomial(n, .5, draws)
    counts = np.stack([n - ones, ones], 1)
    cert = certify_statistics(VoteStatistics(n, counts/n, counts/n, counts), GaussianNoise(1.), alpha,
                              'clopper_pearson', 'hard', simultaneous)
    assert ((1 - abstention_rate(cert)) <= allowed(alpha)) == kept


def test_familywise_holds_for_all_points_together():
    "With 25 hopeless points almost every experiment certifies one falsely, unless alpha is shared."
    alpha, n, points, draws = .05, 301, 25, 800
    ones = rng(0, 'family').binomial(n, .5, (draws, points))
    any_false = {True: 0, False: 0}
    for row in ones:
        counts = np.stack([n - row, row], 1)
        for familywise in any_false:
            cert = certify_statistics(VoteStatistics(n, counts/n, counts/n, counts), GaussianNoise(1.), alpha,
                                      'clopper_pearson', 'hard', familywise=familywise)
            any_false[familywise] += (cert.prediction >= 0).any()
    assert any_false[True]/draws <= alpha + 4*np.sqrt(alpha*(1 - alpha)/draws)
    assert any_false[False]/draws > .4


@pytest.mark.parametrize('bound', bounds.BOUNDS)
def test_certified_radius_stays_below_the_true_one(bound):
    """A half-space of the noise is the worst classifier of Proposition 2: its vote flips at a known total
    norm."""
    sigma, flip, alpha, n, draws = .5, .45, .05, 200, 5000
    votes = (rng(0, 'half-space').normal(0, sigma, (n, draws)) < flip).astype(float)
    cert = certify(np.stack([1 - votes, votes], -1), GaussianNoise(sigma), alpha, bound, 'hard')
    assert (cert.radius > flip).mean() <= alpha + 4*np.sqrt(alpha*(1 - alpha)/draws)
    assert np.median(cert.radius) > .4*flip


# Properties -------------------------------------------------------------------------------------

outputs = arrays(np.float64, st.tuples(st.integers(2, 40), st.integers(1, 4)), elements=st.floats(0, 1))
levels = st.floats(1e-9, .5)


@settings(max_examples=60, deadline=None)
@given(outputs, levels)
def test_bounds_enclose_the_mean_and_shrink_with_alpha(x, alpha):
    for name, bound in bounds.BOUNDS.items():
        y = np.round(x) if name == 'clopper_pearson' else x
        low, high = bound(y, alpha)
        wider_low, wider_high = bound(y, alpha/10)
        assert (0 <= low).all() and (high <= 1).all() and low.shape == y.shape[1:]
        assert (low <= y.mean(0) + 1e-12).all() and (y.mean(0) - 1e-12 <= high).all()
        if name != 'betting':
            assert (wider_low <= low + 1e-12).all() and (high <= wider_high + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(outputs, levels)
def test_bounds_mirror(x, alpha):
    "The upper bound of X is one minus the lower bound of 1 - X."
    for name, bound in bounds.BOUNDS.items():
        y = np.round(x) if name == 'clopper_pearson' else x
        np.testing.assert_allclose(bound(1 - y, alpha)[0], 1 - bound(y, alpha)[1], atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 39))
def test_shards_add_up(seed, n_classes, cut):
    "Certificates from merged shards are those from all outputs at once, and the order of models is free."
    p = np.random.default_rng(seed).dirichlet(np.ones(n_classes), (40, 6)).astype(np.float32)
    shuffled = p[np.random.default_rng(seed + 1).permutation(40)]
    parts = VoteStatistics.from_probabilities(shuffled[:cut]).merge(
        VoteStatistics.from_probabilities(shuffled[cut:]))
    for bound, votes in (('hoeffding', 'soft'), ('empirical_bernstein', 'hard'), ('clopper_pearson', 'hard')):
        whole, merged = certify(p, GaussianNoise(1.), .5, bound,
                                votes), certify_statistics(parts, GaussianNoise(1.), .5, bound, votes)
        np.testing.assert_array_equal(whole.prediction, merged.prediction)
        np.testing.assert_allclose(whole.radius, merged.radius, atol=1e-9)


def test_models_needed_is_the_least_number():
    for name in bounds.BOUNDS:
        for alpha, p in ((.05, .5), (.001, .5), (.001, .9)):
            n = bounds.models_needed(name, alpha, p)
            assert bounds.unanimous_lower(name, n, alpha) > p >= bounds.unanimous_lower(name, n - 1, alpha)


def test_errors_name_the_value_and_the_remedy():
    p = np.tile([[.1, .9]], (50, 1, 1))
    noise = GaussianNoise(1.)
    for change, words in ((dict(alpha=1.), '1.0'), (dict(alpha=float('nan')), 'nan'),
                          (dict(bound='wald'), 'hoeffding'), (dict(votes='loud'), 'hard'),
                          (dict(alpha=1e-30), 'models are needed'),
                          (dict(bound='clopper_pearson'), "votes='hard'")):
        with pytest.raises(ValueError, match=words):
            certify(p, noise, **change)
    for bad, words in ((p[:1], 'models are needed'), (p*1.05, 'sum to 1.05'), (p[0], r'\(1, 2\)'),
                       (p[..., :1], r'\(50, 1, 1\)'), (p[:, :0], r'\(50, 0, 2\)'),
                       (np.where(p == .9, np.nan, p), 'nan'), (p*10, '9.0'), (p - .5, '-0.4')):
        with pytest.raises(ValueError, match=words):
            certify(bad, noise)


def test_a_zero_radius_and_a_tie():
    p = np.full((100, 2, 2), .5)
    cert = certify(p, GaussianNoise(1.))
    assert (cert.prediction == -1).all() and (cert.radius == 0).all() and not cert.covers(1, 0.).any()
    exact = exact_certificate([0], [.5], [.5], GaussianNoise(1.))
    assert exact.prediction[0] == -1 and exact.radius[0] == 0


# Files ------------------------------------------------------------------------------------------

size, log, unit = st.floats(0, 1e300), st.floats(max_value=0), st.floats(0, 1)
noises = st.one_of(st.floats(1e-300, 1e300).map(GaussianNoise), st.floats(1e-3, 1e3).map(LaplaceNoise),
                   st.tuples(st.floats(-10, 0), st.floats(.1, 10)).map(lambda ends: UniformNoise(*ends)))


texts = st.text(st.characters(codec='utf-8'), max_size=5) | st.text(max_size=5)  # these with surrogates
floats = st.floats(allow_nan=False, allow_infinity=False)


def distinct(n, kinds=(st.integers(-2**70, 2**70), texts, floats, st.booleans())):
    "Lists of n different labels of one kind; of booleans there are only two."
    fitting = kinds if n <= 2 else kinds[:-1]
    return st.one_of([st.lists(kind, min_size=n, max_size=n, unique=True) for kind in fitting])


@st.composite
def certificates(draw):
    n = draw(st.integers(1, 6))
    classes = draw(st.none() | st.integers(1, 50) | st.integers(1, 4).flatmap(distinct))
    last = 2**62 if classes is None else (classes if isinstance(classes, int) else len(classes)) - 1
    column = lambda elements: np.array(draw(st.lists(elements, min_size=n, max_size=n)))
    prediction, p_a, p_b = column(st.integers(-1, last)).astype(np.int64), column(unit), column(unit)
    noise = draw(noises)
    arguments = draw(st.dictionaries(st.sampled_from(['d', 'n_poisoned']), st.integers(1, 10**6)))
    unknown = noise.norm == 'linf' and len(arguments) < 2
    radius = np.where((prediction >= 0) & (p_a > p_b), column(st.just(np.nan) if unknown else size), 0)
    return Certificate(classes=classes, prediction=prediction, radius=radius, p_a=p_a, p_b=p_b, noise=noise,
                       radius_arguments=arguments,
                       log_q_a=column(log) if draw(st.booleans()) else None,
                       log_p_b=column(log) if draw(st.booleans()) else None,
                       alpha=draw(unit), bound=draw(st.sampled_from([*bounds.BOUNDS, 'exact'])),
                       votes=draw(st.sampled_from(['soft', 'hard', 'exact'])),
                       n_models=draw(st.integers(0, 10**9)), simultaneous=draw(st.booleans()),
                       familywise=draw(st.booleans()),
                       label_noise=draw(st.floats(0, .999 - .999 / (last + 1))),
                       n_train=draw(st.none() | st.integers(1, 10**6)),
                       test_sigma=draw(st.none() | st.floats(1e-300, 1e300))
                       if isinstance(noise, GaussianNoise) else None)


@settings(max_examples=150, deadline=None)
@given(certificates())
def test_csv_round_trip_is_exact(tmp_path_factory, cert):
    path = tmp_path_factory.mktemp('csv')/'certificate.csv'
    cert.to_csv(path)
    back = Certificate.from_csv(path)
    assert back == cert and back.numbered == cert.numbered
    assert repr(back.labels.tolist()) == repr(cert.labels.tolist())
    assert back.radius.tobytes() == cert.radius.tobytes() or np.isnan(cert.radius).any()
    back.to_csv(path)
    assert Certificate.from_csv(path) == cert


def test_csv_that_is_no_certificate(tmp_path):
    cert = certify(np.tile([[.1, .9]], (50, 3, 1)), GaussianNoise(1.))
    path = tmp_path/'c.csv'
    for text, words in (('', 'missing'), ('prediction,radius\n0,1\n', 'p_a'), ('\n\n\n', 'missing')):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            Certificate.from_csv(path)
    cert.to_csv(path)
    text = path.read_text()
    path.write_text(text + text.splitlines()[1].replace('hoeffding', 'betting') + '\n')
    with pytest.raises(ValueError, match='mixes'):
        Certificate.from_csv(path)
    path.write_text(text.replace('GaussianNoise(sigma=1.0)', '__import__("os")'))
    with pytest.raises(ValueError, match='repr of a noise'):
        Certificate.from_csv(path)


@pytest.mark.parametrize('column, text, words', [
    *((c, t, 'a number in \\[0, 1\\]') for c in ('p_a', 'p_b', 'alpha')
      for t in ('1.01', '-0.1', 'nan', '', 'x')),
    *(('radius', t, 'a number >= 0') for t in ('-1', '-inf', 'nan', '', '1,5')),
    ('radius', 'inf', 'finite where p_a < 1'),
    *(('prediction', t, 'a whole number >= -1') for t in ('-2', '0.5', 'nan', '9' * 30, '')),
    ('prediction', '-1', '0 where the prediction is -1'),
    ('p_a', '0.01', '0 where p_a <= p_b'), ('n_models', '-1', 'whole number'), ('bound', 'wald', 'hoeffding'),
    ('votes', 'loud', 'soft'),
    ('familywise', 'yes', 'True or False'), ('radius_arguments', '[1]', 'JSON object'),
    ('radius_arguments', '[' * 100_000, 'JSON object')])
def test_csv_with_a_wrong_field(tmp_path, column, text, words):
    "The error names line, column, value and what is allowed."
    path = tmp_path/'c.csv'
    certify(np.tile([[.1, .9]], (50, 3, 1)), GaussianNoise(1.)).to_csv(path)
    rows = list(csv.DictReader(path.open(newline='')))
    of_all = column not in ('prediction', 'radius', 'p_a', 'p_b')
    for row in rows if of_all else rows[2:]:
        row[column] = text
    with path.open('w', newline='') as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader(), out.writerows(rows)
    with pytest.raises(ValueError, match=f'line {2 if of_all else 4}, column .*{words}') as error:
        Certificate.from_csv(path)
    assert column in str(error.value) or 'radius' in str(error.value)


def test_csv_with_a_lost_field_or_bytes(tmp_path):
    path = tmp_path/'c.csv'
    certify(np.tile([[.1, .9]], (50, 3, 1)), GaussianNoise(1.)).to_csv(path)
    content = path.read_bytes()
    for change, words in ((content[:-40], 'line 4: '),
                          (content + b'0,1\n', 'line 5: 2 fields, the first line names 14'),
                          (content + b'\xff\n', 'UTF-8'),
                          (content + b'9' * 200_000, 'field larger')):
        path.write_bytes(change)
        with pytest.raises(ValueError, match=words):
            Certificate.from_csv(path)


# Scores -----------------------------------------------------------------------------------------

def test_metrics_against_a_loop():
    g = rng(0, 'metrics')
    prediction, y, radius = g.integers(-1, 3, 200), g.integers(0, 3, 200), np.round(g.random(200)*2, 1)
    base = exact_certificate(np.ones(200, int), np.full(200, .9), np.full(200, .1), GaussianNoise(1.))
    cert = replace(base, prediction=prediction, radius=np.where(prediction < 0, 0, radius))
    for r in (0., .5, 1.):
        points = list(zip(cert.prediction, y, cert.radius))
        assert certified_rate(cert, r) == sum(ri > r for _, _, ri in points)/200
        assert certified_accuracy(cert, y, r) == sum(c == yi and ri > r for c, yi, ri in points)/200
    assert prediction_accuracy(cert, y) == sum(c == yi for c, yi, _ in points)/200


# Labels -----------------------------------------------------------------------------------------

NAMES = {'1, 2': [1, 2], '-1, 1': [-1, 1], '1, -1': [1, -1], '0, 1, 3, 4': [0, 1, 3, 4],
         'booleans': [False, True], 'floats': [.5, 2.], 'int8': np.int8([3, -1]),
         'uint64': np.uint64([2**64 - 1, 0]), 'beyond float64': [2**53, 2**53 + 1],
         'int and float': [2**53 + 1, .5], 'texts': ['no', 'yes'],
         'numbers as texts': ['1', '0'], 'empty text': ['', 'abstain'],
         'odd texts': ['<b>', 'a,"b"\r\n\0\ud800'],
         'objects': np.array(['b', 'a'], object), 'categories': pd.Categorical(['b', 'a']),
         'nullable': pd.array([7, 5], 'Int64')}
FORMS = (list, tuple, lambda v: np.array(v, object), lambda v: pd.Series(v, range(7, 7 + len(v)), object),
         lambda v: pd.Series(v, dtype=object).astype('category'))
MANY = 60


def outputs_and_columns(n_classes, seed=0):
    "Outputs of 150 models, true columns, a certificate without names that abstains and errs here and there."
    g = np.random.default_rng(seed)
    column = g.integers(n_classes, size=MANY)
    favoured = np.where(g.random(MANY) < .2, g.integers(n_classes, size=MANY), column)
    p = np.stack([g.dirichlet(1 + 8*g.random()*(np.arange(n_classes) == c), 150) for c in favoured], 1)
    return p, column, certify(p, GaussianNoise(1.))


def by_hand(cert, column, r):
    "The metrics counted point by point, in columns, where nobody can mistake an abstention for a class."
    answers = [None if c == -1 else c for c in cert.prediction.tolist()]
    points = list(zip(answers, column.tolist(), cert.radius))
    share = lambda rule: sum(rule(*point) for point in points)/len(points)
    return dict(accuracy=share(lambda c, t, _: c == t), attack=share(lambda c, t, _: c == 0),
                certified=share(lambda c, t, radius: c == t and radius > r),
                rate=share(lambda c, t, radius: radius > r), abstains=share(lambda c, t, _: c is None),
                constant=share(lambda c, t, _: t == 0))


def by_metrics(cert, y, target, r):
    assert clean_accuracy(cert, y) == prediction_accuracy(cert, y) == prediction_accuracy(cert.labels, y)
    assert attack_success_rate(cert, target) == attack_success_rate(cert.labels, target)
    assert abstention_rate(cert) == abstention_rate(cert.labels)
    return dict(accuracy=prediction_accuracy(cert, y), certified=certified_accuracy(cert, y, r),
                rate=certified_rate(cert, r), attack=attack_success_rate(cert, target),
                abstains=abstention_rate(cert), constant=constant_accuracy(y, target))


@pytest.mark.parametrize('names', NAMES.values(), ids=NAMES)
def test_metrics_speak_the_labels_of_the_user(names, tmp_path):
    "Every metric is what a count in columns gives, whatever the classes are called and the labels come in."
    p, column, plain = outputs_and_columns(len(names))
    assert .1 < abstention_rate(plain) < .9 and .1 < prediction_accuracy(plain, column) < .95
    cert, wanted = certify(p, GaussianNoise(1.), classes=names), by_hand(plain, column, .3)
    values = list(names)
    y = [values[c] for c in column]
    for labels in [form(y) for form in FORMS]:
        if list(labels) == y:
            assert by_metrics(cert, labels, values[0], .3) == pytest.approx(wanted)
        else:
            assert 2**53 + 1 in y and labels.dtype == 'category'  # pandas has rounded them
    assert [v is None or v != v for v in cert.labels] == (plain.prediction < 0).tolist()
    assert all(label == values[c] for label, c in zip(cert.labels, plain.prediction) if c >= 0)
    cert.to_csv(tmp_path/'c.csv')
    back, first = Certificate.from_csv(tmp_path/'c.csv'), int(np.argmax(plain.prediction >= 0))
    assert back == cert and by_metrics(back, y, values[0], .3) == pytest.approx(wanted)
    assert back.classes.dtype == cert.classes.dtype
    assert repr(back.classes.tolist()) == repr(cert.classes.tolist())
    assert f'class {cert.labels.tolist()[first]!r},' in cert.explain(first)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 4), st.integers(0, 50))
def test_metrics_do_not_depend_on_names(data, n_classes, seed):
    "Any two ways of calling the classes give the same scores."
    p, column, plain = outputs_and_columns(n_classes, seed)
    wanted, r = by_hand(plain, column, .2), .2
    for _ in range(2):
        names = data.draw(distinct(n_classes))
        later = data.draw(st.booleans())
        cert = plain.named(names) if later else certify(p, GaussianNoise(1.), classes=names)
        assert by_metrics(cert, [names[c] for c in column], names[0], r) == pytest.approx(wanted)


@pytest.mark.parametrize('shift', [1, -1, 7])
def test_labels_that_are_no_columns_are_refused_where_classes_have_no_names(shift):
    p, column, plain = outputs_and_columns(2)
    with pytest.raises(ValueError, match='pass classes='):
        prediction_accuracy(plain, column + shift)
    with pytest.raises(ValueError, match='pass classes='):
        certified_accuracy(plain, column + shift, [0, .5])
    for words in (['no', 'yes'], ['0', '1']):
        y = np.array(words)[column]
        with pytest.raises(ValueError, match='pass classes='):
            prediction_accuracy(plain, y)
    assert prediction_accuracy(plain, column == 1) == prediction_accuracy(plain, column)


def test_labels_of_another_kind_or_none_of_the_classes():
    p, column, plain = outputs_and_columns(2)
    y = np.array(['no', 'yes'])[column]
    cert = plain.named(['no', 'yes'])
    gap = 'NaN at point 0'
    for bad, words in ((column, 'numbers such as'), (column == 1, 'booleans such as'),
                       (y[None], r'\(1, 60\)'),
                       (['maybe']*MANY, "60 of 60 labels y, such as 'maybe'"), ([None, *y[1:]], gap),
                       ([np.nan, *y[1:]], gap), ([pd.NA, *y[1:]], gap), ([1, *y[1:]], 'numbers and texts'),
                       ([b'no']*MANY, 'bytes'), (np.zeros(MANY, 'M8[D]'), 'date'), (1j*column, 'complex')):
        with pytest.raises(ValueError, match=words):
            prediction_accuracy(cert, bad)
        with pytest.raises(ValueError, match=words):
            certified_accuracy(cert, bad, .1)
    one_two = plain.named([1, 2])
    with pytest.raises(ValueError, match='booleans such as True'):
        prediction_accuracy(one_two, column == 1)
    with pytest.raises(ValueError, match='finite'):
        prediction_accuracy(plain, np.where(column, np.inf, 0))
    masked = np.ma.masked_array(column, np.arange(MANY) == 3)
    with pytest.raises(ValueError, match='NaN at point 3'):
        prediction_accuracy(plain, masked)


def test_a_class_that_training_had_not_counts_as_wrong():
    p, column, plain = outputs_and_columns(2)
    cert, y = plain.named(['a', 'b']), np.array(['a', 'b'], object)[column]
    y[:6] = 'c'
    with pytest.warns(UserWarning, match="6 of 60 labels y, such as 'c'"):
        score = prediction_accuracy(cert, y)
    assert score == sum(a == t for a, t in zip(cert.labels, y))/MANY < prediction_accuracy(plain, column)


@pytest.mark.parametrize('target', ['maybe', 0, True, None, float('nan'), -1, ['no']])
def test_a_target_that_is_no_class(target):
    _, _, plain = outputs_and_columns(2)
    with pytest.raises(ValueError):
        attack_success_rate(plain.named(['no', 'yes']), target)
    if target not in (0, True):
        with pytest.raises(ValueError):
            attack_success_rate(plain, target)
    if target not in ('maybe',):
        with pytest.raises(ValueError):
            attack_success_rate(['no', 'yes', 'no'], target)
    assert attack_success_rate(['yes', 'yes'], 'no') == 0 and attack_success_rate([1, 0, None], True) == 1/3


@pytest.mark.parametrize('classes, words', [
    (['a'], 'must name 2'), (['a', 'b', 'c'], 'must name 2'), ([], 'must name 2'), (['a', 'a'], 'twice'),
    ([1, 1.], 'twice'), ([1, True], 'booleans and numbers'), ([0, 'a'], 'numbers and texts'),
    ([0, np.nan], 'NaN'), (['a', None], 'None'), ([0, np.inf], 'inf'),
    ('ab', r'shape \(\)'), ({'a', 'b'}, r'shape \(\)'), ([['a', 'b']], r'\(1, 2\)'),
    ([b'a', b'b'], 'bytes'), (np.array(['2020', '2021'], 'M8[Y]'), 'date'), ([1 + 1j, 2], 'complex'),
    ([('a',), ('b',)], r'\(2, 1\)')])
def test_classes_that_name_nothing(classes, words):
    p, _, plain = outputs_and_columns(2)
    stats, columns = VoteStatistics.from_probabilities(p), plain.prediction.clip(0)
    for make in (lambda: certify(p, GaussianNoise(1.), classes=classes), lambda: plain.named(classes),
                 lambda: certify(p, GaussianNoise(1.), bound='betting', classes=classes),
                 lambda: certify_statistics(stats, GaussianNoise(1.), classes=classes)):
        with pytest.raises(ValueError, match=words):
            make()
    if len(classes) < 2 or 'must name' not in words:
        with pytest.raises(ValueError):
            replace(plain, classes=classes)
        with pytest.raises(ValueError):
            exact_certificate(columns, 0*columns + .9, 0*columns, GaussianNoise(1.), classes=classes)


@pytest.mark.parametrize('names', [[1, 2], [-1, 1], [0, 1, 3, 4], ['a', 'b'], [False, True], [1., 2.]],
                         ids=str)
def test_classifiers_certify_in_the_labels_they_were_given(names):
    "Certificates of nearest neighbours: accuracy is scikit-learn's score, labels are those of `predict`."
    g = np.random.default_rng(0)
    column = np.arange(80) % len(names)
    x, y = column[:, None] + .6*g.standard_normal((80, 3)), np.array(names)[column]
    model = SmoothedKNNClassifier(sigma=.3).fit(x[:40], y[:40])
    cert, predicted = model.certify(x[40:]), model.predict(x[40:])
    assert cert.classes.tolist() == model.classes_.tolist() and cert.labels.tolist() == predicted.tolist()
    y, score = y[40:], model.score(x[40:], y[40:])
    assert .5 < prediction_accuracy(cert, y) == prediction_accuracy(predicted, y) == score < 1
    assert certified_accuracy(cert, y, 0.) == score
    share = np.mean(predicted == names[0])
    assert attack_success_rate(cert, names[0]) == attack_success_rate(predicted, names[0]) == share


def test_ambiguous_abstentions_are_refused():
    "A -1 among whole numbers may be a class of the user's or an abstention of `prediction`."
    _, _, plain = outputs_and_columns(2)
    with pytest.raises(ValueError, match='class or an abstention'):
        abstention_rate(plain.prediction)
    assert abstention_rate([1, 0]) == 0 and abstention_rate([None]) == 1
    assert abstention_rate(['a', None]) == abstention_rate([np.nan, 1.]) == .5


def test_batches_make_one_certificate():
    p, column, _ = outputs_and_columns(3)
    cert = certify(p, GaussianNoise(1.), classes=['a', 'b', 'c'])
    batches = [certify(p[:, i:i+25], GaussianNoise(1.), classes=['a', 'b', 'c']) for i in (0, 25, 50)]
    join = Certificate.concatenate
    assert join(batches) == join(iter(batches)) == join([cert]) == cert
    for change in (dict(alpha=.01), dict(noise=GaussianNoise(2.)), dict(classes=['a', 'c', 'b']),
                   dict(classes=None), dict(log_p_b=np.log(cert.p_b))):
        with pytest.raises(ValueError, match='1 differs from certificate 0 in '):
            join([cert, replace(cert, **change)])
    family = certify(p, GaussianNoise(1.), familywise=True)
    with pytest.raises(ValueError, match='in one call'):
        join([family, family])
    with pytest.raises(ValueError, match='no certificates'):
        join([])


def test_words_frames_and_pages_show_names():
    _, _, plain = outputs_and_columns(2)
    cert = plain.named(['<ham>', 'spam'])
    won, lost = np.flatnonzero(cert.prediction >= 0), np.flatnonzero(cert.prediction < 0)
    assert repr(cert.labels[won[0]]) in cert.explain(won[0]) and 'abstains' in cert.explain(lost[0])
    lines = cert.explain([won[0], lost[0]]).split('\n')
    assert [line.split(':')[0] for line in lines[:2]] == [f'Point {won[0]}', f'Point {lost[0]}']
    assert lines[2:] == [cert.explain()] and cert.explain(slice(0, 2)).count('Point') == 2
    assert cert.explain(cert.prediction < 0).count('\n') == len(lost) - 1
    assert '<ham>' not in cert._repr_html_() and '&lt;ham&gt;' in cert[cert.prediction == 0]._repr_html_()
    frame = cert.to_frame(index=range(100, 100 + MANY))
    assert frame.index[0] == 100 and frame.label.isna().tolist() == (cert.prediction < 0).tolist()
    assert set(frame.label.dropna()) == {'<ham>', 'spam'}
    assert cert[won].labels.tolist() == cert.labels[won].tolist()


def test_a_file_with_another_label_or_too_few_classes(tmp_path):
    path = tmp_path/'c.csv'
    certify(np.tile([[.1, .9]], (50, 3, 1)), GaussianNoise(1.), classes=['ham', 'spam']).to_csv(path)
    text = path.read_text()
    label, names = 'line 2, column label: got ', '"[""ham"", ""spam""]"'
    for old, new, words in (('1,spam', '1,ham', label + "'ham', must be 'spam'"),
                            ('1,spam', '0,spam', label + "'spam', must be 'ham'"),
                            (names, '"[""ham"", ""eggs""]"', label + "'spam', must be 'eggs'"),
                            (names, '"[""ham""]"', 'line 2, column prediction: got 1, must be below 1'),
                            *((names, other, 'JSON list of distinct labels')
                              for other in ('"[""ham"", 1]"', '{}', '"[NaN, 1]"', '0', '1' + '0'*12))):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=words):
            Certificate.from_csv(path)
    path.write_text(text.replace('""spam""', '""eggs""', 1))
    with pytest.raises(ValueError, match='mixes'):
        Certificate.from_csv(path)
    long = certify(np.tile([[.1, .9]], (50, 3, 1)), GaussianNoise(1.), classes=['ham', 'spam'*40_000])
    with pytest.raises(ValueError, match='too long'):
        long.to_csv(path)


@pytest.mark.slow
def test_betting_is_fast_enough():
    "At most a second of processor time for 1000 points and 1000 models, both sides."
    x = rng(0, 'time').beta(6, 2, (1000, 1000))
    bounds.betting(x[:, :64], .001)
    start = time.process_time()
    bounds.betting(x, .001)
    assert time.process_time() - start < 1


@pytest.mark.parametrize('noise, arguments',
                         [(UniformNoise(-1., 1.), dict(familiwise=True)),
                          (UniformNoise(-1., 1.), dict(d=4, bond='betting')),
                          (GaussianNoise(1.), dict(d=4)), (LaplaceNoise(1.), dict(n_poisoned=2))])
def test_misspelt_arguments_are_not_taken_for_the_radius(noise, arguments):
    with pytest.raises(ValueError, match='unknown'):
        certify(np.tile([.1, .9], (100, 3, 1)), noise, **arguments)


def test_numbers_of_numpy_reach_the_file(tmp_path):
    cert = certify(np.tile([.1, .9], (100, 3, 1)), UniformNoise(-1., 1.), d=np.prod((2, 2)),
                   n_poisoned=np.int64(2))
    cert.to_csv(tmp_path / 'c.csv')
    assert Certificate.from_csv(tmp_path / 'c.csv').radius_arguments == dict(d=4, n_poisoned=2)
