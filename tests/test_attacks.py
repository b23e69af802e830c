"Triggers against a transcription by hand, norms under every shape, and what poisoning may and may not touch."
import os

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rab_nb import attacks, data
from rab_nb.attacks import Blending, FourPixel, OnePixel, Trigger, poison

real = pytest.mark.skipif('RAB_DATA' not in os.environ, reason='RAB_DATA is not set')
shapes = st.one_of(st.tuples(st.integers(4, 300)),
                   st.tuples(st.integers(1, 4), st.integers(3, 70), st.integers(3, 70)))


def by_hand(kind, shape, norm):
    "The authors' placements, written out."
    x, c = np.zeros(shape), shape[0]
    if shape == (56,):
        for i in ([25] if kind is OnePixel else [25, 26, 27, 50]):
            x[i] = norm if kind is OnePixel else norm / 2
        return x
    one = {28: (23, 23), 32: (15, 15), 224: (112, 112)}[shape[1]]
    four = {28: [(18, 20), (19, 19), (20, 18), (20, 20)], 32: [(14, 16), (15, 15), (16, 14), (16, 16)],
            224: [(112, 112), (111, 113), (113, 111), (113, 113)]}[shape[1]]
    places = [one] if kind is OnePixel else four
    for r, k in places:
        for channel in range(c):
            x[channel, r, k] = norm / (c * len(places))**.5
    return x


@pytest.mark.parametrize('shape', [(1, 28, 28), (3, 32, 32), (3, 224, 224), (56,)])
@pytest.mark.parametrize('kind', [OnePixel, FourPixel])
@pytest.mark.parametrize('norm', [1., .1])
def test_pixels_by_hand(kind, shape, norm):
    np.testing.assert_allclose(kind(norm).pattern(shape), by_hand(kind, shape, norm), rtol=1e-15, atol=0)


@settings(max_examples=150, deadline=None)
@given(shape=shapes, norm=st.floats(1e-6, 1e6), kind=st.sampled_from([OnePixel, FourPixel, Blending]))
def test_norm_is_exact_for_every_shape(shape, norm, kind):
    pattern = kind(norm).pattern(shape)
    assert pattern.shape == shape and pattern.dtype == np.float64
    assert abs(np.sqrt((pattern**2).sum()) / norm - 1) < 1e-14
    places = len(np.unique(np.argwhere(pattern)[:, 1:], axis=0)) if len(shape) == 3 else (pattern != 0).sum()
    if kind is not Blending:
        assert places == (1 if kind is OnePixel else 4)


@settings(max_examples=50, deadline=None)
@given(side=st.integers(8, 64), channels=st.sampled_from([1, 3]))
def test_positions_scale_in_proportion(side, channels):
    near = 28 if channels == 1 else 32
    for kind, low in ((OnePixel, 23 if channels == 1 else 15), (FourPixel, 19 if channels == 1 else 15)):
        centre = np.argwhere(kind(1.).pattern((channels, side, side)))[:, 1:].mean(0)
        assert abs((centre + .5) / side - (low + .5) / near).max() < 1.5 / side


@pytest.mark.parametrize('shape', [(2,), (28, 28), (), (1, 2, 2), (1, 1, 3, 3)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError):
        FourPixel(1.).pattern(shape)


@pytest.mark.parametrize('norm', [0, -1., float('nan'), float('inf')])
@pytest.mark.parametrize('kind', [OnePixel, FourPixel, Blending])
def test_bad_norm(kind, norm):
    with pytest.raises(ValueError, match='norm must be'):
        kind(norm)


def test_unknown_attack():
    with pytest.raises(ValueError, match=r"'sticker'; known are \['one_pixel', 'four_pixel', 'blending'\]"):
        attacks.trigger('sticker', 1.)


def test_apply_copies_clips_and_keeps_type():
    x = np.full((2, 1, 28, 28), .9, np.float32)
    out = OnePixel(1.).apply(x, (0., 1.))
    assert x.max() == np.float32(.9) and out.max() == 1 and out.dtype == np.float32 and out[0, 0, 23, 23] == 1
    assert OnePixel(1.).apply(x)[0, 0, 23, 23] == np.float32(1.9)
    assert Blending(10.).apply(x, (0., 1.)).max() > 1
    with pytest.raises(ValueError, match='floats'):
        OnePixel(1.).apply(np.zeros((1, 56), int))


def test_blending_is_the_same_for_all_rows_or_for_none():
    x = np.zeros((5, 3, 8, 8), np.float64)
    same, own = Blending(1.).apply(x), Blending(1., per_sample=True).apply(x)
    assert (same == same[0]).all() and len({r.tobytes() for r in own}) == 5
    np.testing.assert_array_equal(own[2:], Blending(1., per_sample=True).apply(x[2:], rows=[2, 3, 4]))
    assert (Blending(1., seed=1).pattern((8,)) != Blending(1.).pattern((8,))).all()


@pytest.fixture(scope='module')
def pair(): return data.load('digits', (0, 1))


@pytest.fixture(scope='module')
def ten(): return data.load('digits')


@pytest.mark.parametrize('trigger',
                         [OnePixel(1.), FourPixel(.1), Blending(1.), Blending(1., per_sample=True)])
@pytest.mark.parametrize('rate', [0., .02, .1, .5])
def test_only_the_chosen_rows_change(pair, trigger, rate):
    p = poison(pair, trigger, rate, seed=3)
    rest = np.setdiff1d(np.arange(len(pair.x_train)), p.rows)
    assert len(p.rows) == int(np.floor(rate * len(pair.x_train))) == len(set(p.rows.tolist()))
    assert (pair.y_train[p.rows] == 1).all() and (p.y_train[p.rows] == 0).all()
    np.testing.assert_array_equal(p.x_train[rest], pair.x_train[rest])
    np.testing.assert_array_equal(p.y_train[rest], pair.y_train[rest])
    expected = np.linalg.norm((p.x_train.astype(float) - pair.x_train)[p.rows].reshape(len(p.rows), 64),
                              axis=1)
    np.testing.assert_allclose(p.actual_norms, expected, rtol=1e-13)
    assert p.total_norm == pytest.approx(np.linalg.norm(p.x_train.astype(float) - pair.x_train), rel=1e-12)
    assert p.nominal_total_norm == pytest.approx(len(p.rows)**.5 * trigger.norm)
    assert p.total_norm <= p.nominal_total_norm * (1 + 1e-6)
    assert p.clean is pair and p.classes == pair.classes and p.x_test is pair.x_test


def test_white_pixel_has_no_room():
    x = np.ones((4, 1, 28, 28))
    x[0] = .25
    task = data.from_arrays(x, [1, 1, 0, 0], x, [1, 1, 0, 0], value_range=(0, 1))
    p = poison(task, OnePixel(1.), .5)
    np.testing.assert_array_equal(p.actual_norms, [.75, 0])
    assert (p.nominal_total_norm, p.total_norm) == (2**.5, .75)


def test_scored_set_is_the_triggered_source_class(pair):
    p = poison(pair, FourPixel(1.), .1)
    source = pair.y_test == 1
    np.testing.assert_array_equal(p.x_test_triggered, FourPixel(1.).apply(pair.x_test[source], (0., 1.)))
    assert (p.y_test_triggered == 1).all()
    assert (p.y_test_target == 0).all()
    assert len(p.y_test_triggered) == source.sum()


def test_roles_can_be_exchanged(pair):
    p = poison(pair, OnePixel(1.), .1, target=1)
    assert (p.source_class, p.target_class) == (0, 1)
    assert (p.y_train[p.rows] == 1).all()
    assert (p.y_test_triggered == 0).all()


def test_rows_depend_on_the_seed_alone(pair):
    rows = [poison(pair, t, .1, seed=5).rows for t in (OnePixel(1.), Blending(.1))]
    np.testing.assert_array_equal(*rows)
    np.random.seed(1)
    np.testing.assert_array_equal(rows[0], poison(pair, OnePixel(1.), .1, seed=5).rows)
    assert (rows[0] != poison(pair, OnePixel(1.), .1, seed=6).rows).any()


def test_many_classes(ten):
    p = poison(ten, OnePixel(1.), .05, target=3, source=7)
    assert p.source_class == 7
    assert (ten.y_train[p.rows] == 7).all()
    assert (p.y_train[p.rows] == 3).all()
    assert (p.y_test_triggered == 7).all()
    p = poison(ten, OnePixel(1.), .3, target=3, source=[0, 1, 2, 4, 5, 6, 7, 8, 9])
    assert set(ten.y_train[p.rows]) == set(range(10)) - {3} == set(p.y_test_triggered)
    p = poison(ten, OnePixel(1.), 1., target='all-to-all')
    np.testing.assert_array_equal(p.y_train, (ten.y_train + 1) % 10)
    np.testing.assert_array_equal(p.y_test_target, (ten.y_test + 1) % 10)


@pytest.mark.parametrize('kwargs, message', [
    (dict(rate=-.1), 'rate must be'), (dict(rate=1.01), 'rate must be'),
    (dict(rate=float('nan')), 'rate must be'), (dict(rate=.9), 'at most 0.5'),
    (dict(target=2), 'target must be'), (dict(target=-1), 'target must be'),
    (dict(target='1'), 'target must be'), (dict(target=.5), 'target must be'),
    (dict(target=1, source=1), 'other than the target'), (dict(source=5), 'source must be'),
    (dict(source=[]), 'no class'), (dict(target='all-to-all', source=1), 'leave source out')])
def test_bad_requests(pair, kwargs, message):
    with pytest.raises(ValueError, match=message):
        poison(pair, OnePixel(1.), **dict(rate=.1) | kwargs)


def test_source_is_required_with_many_classes(ten):
    with pytest.raises(ValueError, match='name the source class'):
        poison(ten, OnePixel(1.), .1)


def test_a_trigger_of_ones_own(pair):
    class Shape(Trigger):
        norm = 1.
        def __init__(self, pattern): self._p = pattern
        def pattern(self, shape): return self._p
    bright = np.ones((1, 8, 8)) / 8
    assert poison(pair, Shape(bright), .1).total_norm <= 28**.5
    with pytest.raises(ValueError, match='pattern has shape'):
        poison(pair, Shape(np.ones((5, 8, 8))), .1)
    with pytest.raises(ValueError, match='not finite'):
        poison(pair, Shape(bright * np.nan), .1)


def test_poisoned_arrays_are_read_only(pair):
    p = poison(pair, OnePixel(1.), .1)
    for k in ('x_train', 'y_train', 'x_test', 'y_test', 'rows', 'actual_norms', 'x_test_triggered',
              'y_test_triggered', 'y_test_target'):
        with pytest.raises(ValueError, match='read-only'):
            getattr(p, k)[:1] = 0


@real
@pytest.mark.parametrize('name, classes, rows, total', [
    ('mnist', (0, 1), 1266, 35.6), ('cifar10', ('airplane', 'bird'), 1000, 31.6),
    ('spambase', None, 368, 19.2)])
def test_total_norms_of_the_real_attacks(name, classes, rows, total):
    p = poison(data.load(name, classes), Blending(1.), .1)
    assert len(p.rows) == rows
    assert abs(p.total_norm - total) < .05
    assert abs(p.nominal_total_norm - rows**.5) < 1e-9
