"What is refused, warned about and accepted: frames, images, scales, labels, networks, stacks and devices"
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_dataframe_column_names_consistency
from torch.nn.utils import parametrizations

from rab_nb import data
from rab_nb.ensemble import LOOK, RABClassifier, warn_one_class
from rab_nb.training import TrainSpec, check_logits, check_network, loss_per_sample, resolved, train_shard
from rab_nb.knn import SmoothedKNNClassifier
from rab_nb.models import digits_cnn, mlp
from rab_nb.noise import GaussianNoise, LaplaceNoise, UniformNoise

RNG = np.random.default_rng(0)
DIGITS, DIGIT = load_digits(n_class=2, return_X_y=True)
DIGITS = (DIGITS.reshape(-1, 1, 8, 8) / 16).astype(np.float32)


class Ensemble(RABClassifier):
    "RABClassifier whose module follows the data."
    def __init__(self, n_estimators=6, epochs=20, stack=3, noise=GaussianNoise(.2)):
        super().__init__(None, noise, n_estimators, epochs, 16, .02, stack=stack, device='cpu', n_jobs=1)

    @property
    def module(self):
        return partial(mlp, self.n_features_in_,
                       n_outputs=len(self.classes_) if len(self.classes_) > 2 else 1)

    @module.setter
    def module(self, value): pass


BOTH = pytest.mark.parametrize('make', [SmoothedKNNClassifier, Ensemble])


def network(module, **changes):
    settings = dict(n_estimators=4, epochs=2, batch_size=16, lr=1e-2, device='cpu', n_jobs=1)
    return RABClassifier(module, changes.pop('noise', GaussianNoise(.3)), **(settings | changes))


def shard(x, y, **settings):
    "The first model, as a run of the command line asks for it."
    spec = TrainSpec(**(dict(noise=GaussianNoise(.3), device='cpu', epochs=1) | settings))
    return train_shard(spec, x, y, {}, [0])


def said(call, *args, **kwargs):
    "The result, and the texts of the UserWarnings that came with it."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        result = call(*args, **kwargs)
    return result, [str(w.message) for w in found if w.category is UserWarning]


def silent(call, *args, **kwargs):
    result, texts = said(call, *args, **kwargs)
    assert texts == []
    return result


# ---- frames -------------------------------------------------------------------------------------

N = 30
Y = np.arange(N) % 2
TABLE = pd.DataFrame({'age': RNG.integers(0, 9, N) + 9 * Y, 'height': RNG.normal(size=N) + 3 * Y,
                      'smokes': RNG.random(N) < .5,
                      'town': np.array(['Ulm', 'Bonn', 'Kiel'])[RNG.integers(0, 3, N)]})
NUMBERS = TABLE[['age', 'height', 'smokes']]
ACCEPTED = {
    'dummies': pd.get_dummies(TABLE), 'bool and float': TABLE[['height', 'smokes']],
    'only bool': TABLE[['smokes']],
    'convert_dtypes': NUMBERS.convert_dtypes(), 'Float64': NUMBERS.astype('Float64'),
    'Int8 and float32': NUMBERS.astype({'age': 'Int8', 'height': 'float32'}),
    'boolean': NUMBERS.astype({'smokes': 'boolean'}), 'objects that are numbers': NUMBERS.astype(object),
    'category of numbers': NUMBERS.assign(age=pd.Categorical(NUMBERS.age)),
    'sparse': NUMBERS.assign(age=pd.arrays.SparseArray(NUMBERS.age)),
    'passthrough': ColumnTransformer([('z', StandardScaler(), ['height'])],
                                     remainder='passthrough').fit_transform(NUMBERS)}


@BOTH
@pytest.mark.parametrize('name', ACCEPTED)
def test_frames_that_scikit_learn_accepts(make, name):
    "They are the numbers that they show: the answers are those of a float array."
    frame = ACCEPTED[name]
    if name != 'sparse':
        KNeighborsClassifier(1).fit(frame, Y)
    plain = np.array([[float(v) for v in row] for row in np.asarray(frame)])
    fitted = silent(make().fit, frame, Y)
    np.testing.assert_array_equal(silent(fitted.predict_proba, frame),
                                  make().fit(plain, Y).predict_proba(plain))


@BOTH
@pytest.mark.parametrize('change, words', [
    (dict(town=TABLE.town), "row 0, column town: '"),
    (dict(height=TABLE.height.astype(str)), 'column height'),
    (dict(height=TABLE.height.astype(object).where(TABLE.index != 7, '1,5')), "row 7, column height: '1,5'"),
    (dict(age=pd.Categorical(TABLE.town)), 'column age'),
    (dict(age=pd.date_range('2020', periods=N)), 'column age'),
    (dict(age=[{}] * N), 'column age: {}')])
def test_columns_that_are_no_numbers_are_named(make, change, words):
    with pytest.raises(ValueError, match=r'X\.astype\(float\)') as e:
        make().fit(NUMBERS.assign(**change), Y)
    assert words in str(e.value)


def holed(frame, row, value=np.nan):
    "The frame with one entry of its second column replaced."
    frame = frame.copy()
    frame.iloc[row, 1] = value
    return frame


@BOTH
@pytest.mark.parametrize('x, words', [
    (holed(NUMBERS, 5), 'nan in row 5'), (holed(NUMBERS.convert_dtypes(), 4, pd.NA), 'nan in row 4'),
    (holed(NUMBERS.astype(object), 3, None), 'nan in row 3'),
    (holed(NUMBERS.astype(object), 2, pd.NA), 'nan in row 2'),
    (np.ma.masked_less(NUMBERS.astype(float).to_numpy(), 1), 'masked'),
    (pd.DataFrame({'a': pd.date_range('2020', periods=N)}), 'datetime64'), (np.full((N, 2), '1.5'), 'astype'),
    (np.full((N, 2), b'1'), 'numeric'), ([[1.]] * (N - 1) + [[1., 2.]], 'equal rows'),
    (np.full((N, 2), 1 + 1j), 'Complex data not supported'), (np.full((N, 1), 10**400, object), 'float64'),
    ({'a': 1}, 'no numbers'), (None, 'non-empty'), ('text', 'numeric')])
def test_other_inputs_are_refused_with_the_place(make, x, words):
    with pytest.raises(ValueError) as e:
        make().fit(x, Y)
    assert words in str(e.value)


@BOTH
def test_float32_or_float64_is_said(make):
    x = NUMBERS.to_numpy(np.float64)
    x[9, 1] = 1e39
    if make is Ensemble:
        with pytest.raises(ValueError,
                           match=r'too large for float32 in 1 of 30 rows, the first is 1e\+39 in row 9'):
            make().fit(x, Y)
    x[9, 1] = -np.inf
    with pytest.raises(ValueError, match='in 1 of 30 rows, the first is -inf in row 9'):
        make().fit(x, Y)


# ---- names --------------------------------------------------------------------------------------

MOVED = {
    'reversed': (lambda f: f[f.columns[::-1]], 'must be in the same order as they were in fit'),
    'two swapped': (lambda f: f[['height', 'age', 'smokes']], 'same order'),
    'renamed': (lambda f: f.rename(columns={'age': 'years'}),
                'unseen at fit time:\n- years\nFeature names seen at fit time, yet now missing:\n- age'),
    'missing': (lambda f: f.drop(columns='smokes'), 'yet now missing:\n- smokes'),
    'added': (lambda f: f.assign(extra=1.), 'unseen at fit time:\n- extra'),
    'added in front': (lambda f: f.assign(extra=1.)[['extra', *f.columns]], 'unseen at fit time:\n- extra'),
    'other case': (lambda f: f.rename(columns=str.upper), '- AGE')}


@BOTH
@pytest.mark.parametrize('how', MOVED)
def test_columns_that_changed_since_fit(make, how):
    move, words = MOVED[how]
    fitted, other = make().fit(NUMBERS, Y), move(NUMBERS)
    assert fitted.feature_names_in_.tolist() == list(NUMBERS.columns) and fitted.n_features_in_ == 3
    own = ['log_proba', 'distances'] if make is SmoothedKNNClassifier else ['model_probabilities']
    for ask in ['predict', 'predict_proba', 'certify', *own]:
        with pytest.raises(ValueError, match='feature names should match') as e:
            getattr(fitted, ask)(other)
        assert words in str(e.value)
    with pytest.raises(ValueError, match='feature names should match'):
        fitted.score(other, Y)


@BOTH
def test_scikit_learns_own_check_of_names(make):
    check_dataframe_column_names_consistency(make.__name__, make())


@BOTH
def test_names_on_one_side_only(make):
    named, plain = make().fit(NUMBERS, Y), make().fit(NUMBERS.to_numpy(float), Y)
    p, [text] = said(named.predict_proba, NUMBERS.to_numpy(float))
    assert 'X does not have valid feature names' in text
    q, [text] = said(plain.predict_proba, NUMBERS)
    assert 'was fitted without feature names' in text and np.array_equal(p, q)
    assert not hasattr(named.fit(NUMBERS.to_numpy(float), Y), 'feature_names_in_')
    numbered = NUMBERS.set_axis(range(3), axis=1)
    assert not hasattr(silent(named.fit, numbered, Y), 'feature_names_in_')


def test_evaluation_sets_have_the_names_of_the_training_set():
    with pytest.raises(ValueError, match='same order'):
        Ensemble().fit(NUMBERS, Y, dict(test=NUMBERS[NUMBERS.columns[::-1]]))
    assert silent(Ensemble().fit, NUMBERS, Y, dict(test=NUMBERS[:5])).predict('test').shape == (5,)


def test_names_are_saved(tmp_path):
    fitted = Ensemble().fit(NUMBERS, Y)
    fitted.save(tmp_path / 'a.safetensors')
    back = RABClassifier.load(tmp_path / 'a.safetensors', partial(mlp, 3))
    assert back.feature_names_in_.tolist() == list(NUMBERS.columns)
    assert np.array_equal(silent(back.predict_proba, NUMBERS), fitted.predict_proba(NUMBERS))
    with pytest.raises(ValueError, match='same order'):
        back.predict(NUMBERS[NUMBERS.columns[::-1]])
    Ensemble().fit(NUMBERS.to_numpy(float), Y).save(tmp_path / 'b.safetensors')
    assert not hasattr(RABClassifier.load(tmp_path / 'b.safetensors', partial(mlp, 3)), 'feature_names_in_')


@BOTH
@pytest.mark.parametrize('x, y', [(NUMBERS.assign(age='a'), Y),
                                  (NUMBERS[['height']], np.where(Y, 'a', 'b')[:9]),
                                  (TABLE[['height']], np.full(N, np.nan))])
def test_a_fit_that_fails_leaves_the_classifier_as_it_was(make, x, y):
    fitted = make().fit(NUMBERS, np.where(Y, 'yes', 'no'))
    before, names = fitted.predict(NUMBERS), fitted.feature_names_in_
    with pytest.raises(ValueError):
        fitted.fit(x, y)
    assert fitted.feature_names_in_ is names and np.array_equal(fitted.predict(NUMBERS), before)


def test_a_network_that_fails_leaves_the_classifier_as_it_was():
    fitted = network(partial(mlp, 3), epochs=10).fit(NUMBERS, np.where(Y, 'yes', 'no'))
    before = fitted.predict(NUMBERS)
    with pytest.raises(ValueError, match='module fails'):
        fitted.fit(np.zeros((6, 7)), [1, 2, 3] * 2)
    assert np.array_equal(fitted.predict(NUMBERS), before) and fitted.n_features_in_ == 3


# ---- labels -------------------------------------------------------------------------------------

@BOTH
@pytest.mark.parametrize('labels', [pd.Series(Y, dtype='Int64'), pd.Series(Y > 0, dtype='boolean'),
                                    pd.Series(np.where(Y, 'a', 'b'), dtype='string'),
                                    pd.Categorical(np.where(Y, 'a', 'b')), Y.astype(object),
                                    (Y > 0).astype(object), pd.Series(Y, dtype='Float64'), list(Y)])
def test_labels_of_pandas(make, labels):
    fitted = silent(make().fit, NUMBERS, labels)
    kind = np.asarray(list(labels)).dtype.kind
    assert len(fitted.classes_) == 2 and fitted.classes_.dtype.kind in ('O' if kind == 'U' else kind) + 'U'
    assert np.mean(fitted.predict(NUMBERS) == np.array(list(labels))) > .9


@BOTH
@pytest.mark.parametrize('hole', [None, np.nan, pd.NA, pd.NaT])
def test_missing_labels_are_no_class(make, hole):
    for y in (pd.Series(np.where(Y, 'a', 'b'), dtype=object), pd.Series(Y, dtype=object)):
        y[4] = hole
        with pytest.raises(ValueError, match='1 missing labels, the first in row 4'):
            make().fit(NUMBERS, y)


# ---- images -------------------------------------------------------------------------------------

COLOUR = RNG.random((20, 12, 10, 3), dtype=np.float32)
FIRST = np.moveaxis(COLOUR, -1, 1)
LABEL = np.arange(20) % 2
conv = lambda channels=3: nn.Sequential(nn.Conv2d(channels, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                        nn.Flatten(), nn.Linear(2, 1))


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_channels_that_come_last(channels):
    x = RNG.random((20, 12, 10, channels), dtype=np.float32)
    with pytest.raises(ValueError, match=r'channels of \(12, 10, .\) seem .*moveaxis\(X, -1, 1\)'):
        network(partial(conv, channels)).fit(x, LABEL)
    fitted = network(partial(conv, channels)).fit(np.moveaxis(x, -1, 1), LABEL)
    with pytest.raises(ValueError, match=r'another order.*trained on inputs of shape .*np.moveaxis'):
        fitted.predict(x)


def test_a_network_that_works_on_channels_that_come_last_is_left_alone():
    bright = COLOUR[:, :, :, 0].mean((1, 2)) > np.median(COLOUR[:, :, :, 0].mean((1, 2)))
    flat = silent(network(partial(mlp, 360), epochs=30).fit, COLOUR, bright)
    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv()
        def forward(self, x): return self.net(x.permute(0, 3, 1, 2))
    check_network(resolved(TrainSpec(Permuted, GaussianNoise(1.), device='cpu')), COLOUR)
    assert flat.score(COLOUR, bright) > .9


def test_grey_images_without_a_channel():
    with pytest.raises(ValueError, match=r'pass X\[:, None\]'):
        network(partial(conv, 1)).fit(RNG.random((20, 12, 10)), LABEL)


def test_distances_look_at_the_order_of_the_numbers():
    model = SmoothedKNNClassifier().fit(FIRST, LABEL)
    same = model.predict_proba(FIRST)
    assert np.array_equal(model.predict_proba(FIRST.reshape(20, -1)), same)
    for other in (COLOUR, FIRST.swapaxes(2, 3)):
        with pytest.raises(ValueError, match='as many numbers in another order'):
            model.predict_proba(other)
    with pytest.raises(ValueError,
                       match='X has 120 features, but SmoothedKNNClassifier is expecting 360 features'):
        model.predict(FIRST[:, 0])
    grey = SmoothedKNNClassifier().fit(FIRST[:, :1], LABEL)
    assert np.array_equal(grey.predict_proba(FIRST[:, 0]), grey.predict_proba(FIRST[:, 0].reshape(20, -1)))
    row = SmoothedKNNClassifier().fit(FIRST.reshape(20, -1), LABEL)
    assert np.array_equal(row.predict_proba(FIRST), same)


def test_arrays_for_attacks_have_their_channels_in_front():
    with pytest.raises(ValueError, match=r'pass np.moveaxis\(x_train, -1, 1\)'):
        data.from_arrays(COLOUR, LABEL, COLOUR, LABEL)
    assert data.from_arrays(FIRST, LABEL, FIRST, LABEL).input_shape == (3, 12, 10)


def test_frames_for_attacks():
    task = data.from_arrays(NUMBERS.convert_dtypes(), Y, NUMBERS, Y)
    assert np.array_equal(task.x_train,
                          NUMBERS.astype('float32')) and np.array_equal(task.x_test, task.x_train)
    with pytest.raises(ValueError, match='same in the same order'):
        data.from_arrays(NUMBERS, Y, NUMBERS[NUMBERS.columns[::-1]], Y)
    with pytest.raises(ValueError,
                       match='x_test has entries that are no numbers, the first in row 0, column town'):
        data.from_arrays(NUMBERS, Y, TABLE, Y)
    with pytest.raises(ValueError, match='astype'):
        data.from_arrays(NUMBERS.astype(str), Y, NUMBERS, Y)


# ---- image files --------------------------------------------------------------------------------

PICTURE = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3) * 1
TURNS = {1: PICTURE, 2: PICTURE[:, ::-1], 3: PICTURE[::-1, ::-1], 4: PICTURE[::-1], 5: PICTURE.swapaxes(0, 1),
         6: np.rot90(PICTURE), 7: np.rot90(PICTURE, 2).swapaxes(0, 1),
         8: np.rot90(PICTURE, -1)}  # how the file holds what it shows


@pytest.mark.parametrize('suffix', ['png', 'tiff', 'webp'])
@pytest.mark.parametrize('turn', TURNS)
def test_images_are_read_as_they_are_shown(tmp_path, turn, suffix):
    note = Image.Exif()
    note[0x0112] = turn
    turned = Image.fromarray(np.ascontiguousarray(TURNS[turn]))
    turned.save(tmp_path / f'a.{suffix}', exif=note, lossless=True)
    expected = np.asarray(Image.fromarray(PICTURE).resize((5, 5), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(data.read_image(tmp_path / f'a.{suffix}', 5), expected)


def palette():
    return Image.fromarray(np.uint8([[0, 1], [2, 1]])).convert('P')


def with_alpha(lowest):
    alpha = np.full((6, 9), 255, np.uint8)
    alpha[2, 3] = lowest
    return Image.fromarray(np.dstack([PICTURE, alpha]))


@pytest.mark.parametrize('save', [
    lambda path: with_alpha(254).save(path / 'a.png'), lambda path: with_alpha(0).save(path / 'a.png'),
    lambda path: with_alpha(0).convert('LA').save(path / 'a.png'),
    lambda path: with_alpha(0).save(path / 'a.webp', lossless=True),
    lambda path: with_alpha(0).save(path / 'a.tiff'),
    lambda path: Image.fromarray(PICTURE).save(path / 'a.png', transparency=(0, 1, 2)),
    lambda path: Image.fromarray(PICTURE[..., 0]).save(path / 'a.png', transparency=27),
    lambda path: palette().save(path / 'a.gif', transparency=1),
    lambda path: palette().save(path / 'a.png', transparency=1)])
def test_transparent_images_are_refused(tmp_path, save):
    save(tmp_path)
    [path] = tmp_path.iterdir()
    with pytest.raises(ValueError, match=r'\d% of its pixels are transparent') as e:
        data.read_image(path, 6)
    assert path.name in str(e.value) and 'alpha_composite' in str(e.value)


def resized(image):
    return np.asarray(image.convert('RGB').resize((9, 9), Image.Resampling.BILINEAR)).astype(int)


@pytest.mark.parametrize('mode, atol', [('RGBA', 0), ('P', 40), ('CMYK', 0), ('L', 256), ('LA', 256),
                                        ('1', 256)])
def test_other_modes_become_rgb(tmp_path, mode, atol):
    image = Image.fromarray(PICTURE).convert(mode)
    path = tmp_path / ('a.tiff' if mode == 'CMYK' else 'a.png')
    image.save(path)
    found = data.read_image(path, 9).astype(int)
    assert np.array_equal(found, resized(image))
    assert np.abs(found - resized(Image.fromarray(PICTURE))).max() <= atol
    if mode in ('L', 'LA', '1'):
        assert (found == found[..., :1]).all()


@pytest.mark.parametrize('dtype', [np.uint16, np.int32, np.float32])
def test_deep_greys_are_refused(tmp_path, dtype):
    Image.fromarray(np.arange(54).reshape(6, 9).astype(dtype)).save(tmp_path / 'a.tiff')
    with pytest.raises(ValueError, match='more than 8 bits'):
        data.read_image(tmp_path / 'a.tiff', 4)


# ---- scale --------------------------------------------------------------------------------------

BYTES = RNG.integers(0, 256, (40, 1, 8, 8)).astype(np.uint8)
BYTES[:2] = np.array([0, 255], np.uint8)[:, None, None, None]
GREY = 'noise of 1 grey level, 1/255 of the range'


@pytest.mark.parametrize('x', [BYTES, BYTES.astype(np.float32), BYTES[:, 0], BYTES.reshape(40, -1),
                               np.repeat(BYTES, 3, 1)],
                         ids=['uint8', 'float', 'no channel', 'flat', 'colour'])
def test_bytes_against_a_sigma_of_one(x):
    y = np.arange(40) % 2
    _, [text] = said(SmoothedKNNClassifier(sigma=1.).fit, x, y)
    assert GREY in text and 'sigma' in text
    _, texts = said(network(partial(mlp, x[0].size), noise=GaussianNoise(1.)).fit, x, y)
    assert sum(GREY in text for text in texts) == 1


@pytest.mark.parametrize('x, words', [
    (np.repeat([0., 16], 20)[:, None, None] * np.ones((4, 4)), 'Divide X by 16'), (BYTES, 'Divide X by 255'),
    (np.linspace(0, 120, 160).astype(np.uint8).reshape(40, 4), 'feature 1 of X runs from 0 to 118')])
def test_advice_fits_the_numbers(x, words):
    _, [text] = said(SmoothedKNNClassifier(sigma=.1).fit, x, np.arange(len(x)) % 2)
    assert words in text


@pytest.mark.parametrize('sigma', [25., 2.6])
def test_bytes_against_noise_of_their_size(sigma):
    silent(SmoothedKNNClassifier(sigma=sigma).fit, BYTES, np.arange(40) % 2)
    silent(SmoothedKNNClassifier(sigma=sigma / 255).fit, BYTES / 255, np.arange(40) % 2)


@pytest.mark.parametrize('noise, size', [(GaussianNoise(.5), .5), (LaplaceNoise(.5), .5 * 2**.5),
                                         (UniformNoise(-1., 1.), 3**-.5)])
def test_a_column_in_other_units(noise, size):
    x = RNG.normal(size=(40, 3))
    x[:, 1] = 1e4 * np.linspace(0, 1, 40)
    _, texts = said(network(partial(mlp, 3), noise=noise).fit, x, np.arange(40) % 2)
    [text] = [t for t in texts if 'feature 1 of X runs from 0 to 10000' in t]
    ratio = float(text.split('10000, ')[1].split(' times')[0])
    assert ratio == pytest.approx(1e4 / size, rel=.1) and 'radii are in the units' in text
    if isinstance(noise, GaussianNoise):
        _, [text] = said(SmoothedKNNClassifier(sigma=.5).fit, x, np.arange(40) % 2)
        assert '2e+04 times sigma' in text and 'deviation of 0.5' in text


def test_an_offset_is_no_range():
    silent(SmoothedKNNClassifier().fit, RNG.normal(size=(40, 3)) + [0, 1000, -1e6], np.arange(40) % 2)


# ---- models that have learnt nothing ------------------------------------------------------------

def stubborn():
    "A network that has made up its mind, and too few steps to change it."
    net = digits_cnn()
    with torch.no_grad():
        net[-1].bias.fill_(9.)
    return net


@pytest.mark.parametrize('stack', [1, 5, 'auto'])
@pytest.mark.parametrize('n', [1, 4, 7])
@pytest.mark.parametrize('keep_models', [True, False])
def test_an_ensemble_that_answers_one_class_says_so(stack, n, keep_models):
    clf = network(stubborn, n_estimators=n, stack=stack, lr=1e-6, keep_models=keep_models)
    _, [text] = said(clf.fit, DIGITS[:100], np.array(['no', 'yes'])[DIGIT[:100]], dict(test=DIGITS[:9]))
    models = n if stack == 'auto' else min(n, 5)
    assert f"first {models} models gives one answer ('yes' for {models} of them) at 100.0% of 64" in text


@pytest.mark.parametrize('classes', [1, 2])
def test_a_few_right_answers_do_not_silence_it(classes):
    "Models that answer one class for 99 % of the rows, each its own."
    p = np.eye(2)[np.tile(np.arange(10)[:, None] % classes, 64)]
    for wrong, expected in ((6, 1), (7, 0)):
        q = p.copy()
        q[:wrong, 0] = q[:wrong, 0, ::-1]
        look = warn_one_class(np.array(['no', 'yes']), 100)
        _, texts = said(look, {0: dict(probabilities={LOOK: q[:4]})})
        assert texts == []  # fewer than five models
        _, texts = said(look, {0: dict(probabilities={LOOK: q})})
        assert len(texts) == expected
        assert all(f"('no' for {10 // classes} of them) at 99.1%" in t for t in texts)


def test_noise_that_drowns_the_data():
    clf = network(digits_cnn, n_estimators=20, stack=5, epochs=3, noise=GaussianNoise(1000.))
    _, texts = said(clf.fit, DIGITS[:100], DIGIT[:100])
    assert sum('take less noise' in t for t in texts) == 1


def test_it_is_said_before_the_other_groups_are_trained(monkeypatch):
    from rab_nb import training
    done, real = [], training.train_group
    monkeypatch.setattr(training, 'train_group', lambda *a, **k: done.append(1) or real(*a, **k))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(UserWarning, match='learnt nothing'):
            network(stubborn, n_estimators=40, stack=5, lr=1e-6).fit(DIGITS[:100], DIGIT[:100])
    assert len(done) == 1


@pytest.mark.parametrize('share', [.5, .1, .03])
def test_models_that_know_a_rare_class_are_not_accused(share):
    rows = np.r_[np.flatnonzero(DIGIT == 0)[:150], np.flatnonzero(DIGIT == 1)[:max(4, int(150 * share))]]
    fitted = silent(network(digits_cnn, epochs=30, n_estimators=6, stack=3).fit, DIGITS[rows], DIGIT[rows])
    assert fitted.model_probabilities(LOOK).shape[1] == 64
    assert fitted.score(DIGITS[rows], DIGIT[rows]) > .95


def test_the_look_changes_no_model():
    a = network(digits_cnn).fit(DIGITS[:60], DIGIT[:60])
    b = network(digits_cnn, keep_models=False).fit(DIGITS[:60], DIGIT[:60], dict(test=DIGITS[60:70]))
    assert np.array_equal(a.model_probabilities(DIGITS[60:70]), b.model_probabilities('test'))
    with pytest.raises(ValueError, match=r"it had \['test'\]"):
        b.predict('other')


def test_an_unfinished_ensemble_says_so():
    fitted = network(digits_cnn, n_estimators=8, stack=2, epochs=6).fit(DIGITS[:100], DIGIT[:100])
    silent(fitted.predict, DIGITS[:5])
    del fitted.groups_[2]
    for ask in ('predict', 'predict_proba', 'model_probabilities', 'certify'):
        _, [text] = said(getattr(fitted, ask), DIGITS[:5], **(dict(alpha=.2) if ask == 'certify' else {}))
        assert '6 models answer, n_estimators is 8' in text and 'warm_start=True' in text


# ---- networks that end in a probability ---------------------------------------------------------

class Then(nn.Module):
    "A network and what a wrapper does to its outputs, in one mode or both."
    def __init__(self, net, f, only=None):
        super().__init__()
        self.net, self.f, self.only = net, f, only

    def forward(self, x): return self.f(self.net(x)) if self.only in (None, self.training) else self.net(x)


PROBABILITIES = {
    'sigmoid': torch.sigmoid, 'softmax': lambda z: z.softmax(-1) if z.shape[1] > 1 else z.sigmoid(),
    'smoothed': lambda z: .05 + .9 * z.sigmoid(), 'hardsigmoid': F.hardsigmoid,
    'clamp': lambda z: z.clamp(0, 1), 'tanh': lambda z: (z.tanh() + 1) / 2,
    'exp of log-softmax': lambda z: z.log_softmax(-1).exp() if z.shape[1] > 1 else F.logsigmoid(z).exp(),
    'normalised': lambda z: F.normalize(F.softplus(z), p=1) if z.shape[1] > 1 else z.sigmoid(),
    'normal cdf': lambda z: (1 + torch.erf(z)) / 2,
    'float64': lambda z: z.double().sigmoid().float()}
LOGITS = {'identity': lambda z: z, 'log-softmax': lambda z: z.log_softmax(-1) if z.shape[1] > 1 else z,
          'log-sigmoid': F.logsigmoid, 'hundredth': lambda z: .01 * z,
          'shifted': lambda z: z + .5, 'next to one half': lambda z: .5 + 1e-4 * z, 'softplus': F.softplus}


@pytest.mark.parametrize('n_outputs', [1, 2, 3])
@pytest.mark.parametrize('name', PROBABILITIES)
def test_probabilities_are_refused_before_training(name, n_outputs):
    y = np.arange(60) % max(n_outputs, 2)
    module = Then(digits_cnn(n_outputs), PROBABILITIES[name])
    with pytest.raises(ValueError, match='are probabilities already, as after a s.* remove the last layer'):
        network(module).fit(DIGITS[:60], y)
    with pytest.raises(ValueError, match='remove the last layer'):
        shard(DIGITS[:60], y, module=module, n_classes=max(n_outputs, 2))


@pytest.mark.parametrize('only, words', [(False, 'already, as'), (True, 'already in training mode')])
def test_probabilities_in_one_mode(only, words):
    with pytest.raises(ValueError, match=words):
        network(Then(digits_cnn(), torch.sigmoid, only)).fit(DIGITS[:60], DIGIT[:60])


@pytest.mark.parametrize('n_outputs', [1, 2, 3])
@pytest.mark.parametrize('name', LOGITS)
def test_logits_are_accepted(name, n_outputs): check_logits(Then(digits_cnn(n_outputs), LOGITS[name]), DIGITS)


def body(rng, d, n_outputs):
    "A random network; its last layer may start at or near a constant."
    kinds = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.ELU, nn.Softplus, nn.Identity, nn.Hardtanh,
             partial(nn.Softmax, -1)]
    act, width, norm = kinds[rng.integers(len(kinds))], int(rng.choice([2, 4, 16, 64])), rng.integers(5)
    layers, n = [], d
    for _ in range(rng.integers(0, 4)):
        layer, wrap = nn.Linear(n, width, bias=bool(rng.integers(4))), rng.integers(8)
        layers.append([parametrizations.spectral_norm,
                       parametrizations.weight_norm][wrap](layer) if wrap < 2 else layer)
        if norm < 2:
            layers.append([nn.BatchNorm1d, nn.LayerNorm][norm](width))
        layers += [act()] + [nn.Dropout(.3)] * (rng.random() < .2)
        n = width
    last, start = nn.Linear(n, n_outputs), rng.integers(6)
    with torch.no_grad():
        if start < 2:
            last.weight.mul_([0., 1e-3][start])
        if start < 3:
            last.bias.fill_([0., .5, 1 / n_outputs, .9][rng.integers(4)])
    return nn.Sequential(*layers, last)


def trained(module, x, y, steps):
    optimiser = torch.optim.Adam(module.train().parameters(), 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        out = module(x)
        loss_per_sample(out, y).mean().backward()
        optimiser.step()
    return module


def test_random_networks():
    "No honest network is refused and no probability passes, untrained or after a few steps."
    for seed in range(150):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        d, n_outputs = int(rng.choice([1, 2, 5, 20])), int(rng.choice([1, 2, 3, 10]))
        x = torch.randn(8, d) * float(rng.choice([.1, 1, 10])) + float(rng.choice([0, 1]))
        y, steps = torch.arange(8) % max(n_outputs, 2), int(rng.choice([0, 1, 5]))
        net = body(rng, d, n_outputs)
        for table, refused in ((LOGITS, False), (PROBABILITIES, True)):
            name = list(table)[rng.integers(len(table))]
            module = trained(Then(net, table[name]), x, y, steps)
            if refused:
                with pytest.raises(ValueError, match='remove the last layer'):
                    check_logits(module, x.numpy())
            else:
                check_logits(module, x.numpy())


# ---- what networks return -----------------------------------------------------------------------

class Returns(nn.Module):
    def __init__(self, f, mode=None):
        super().__init__()
        self.net, self.f, self.mode = digits_cnn(), f, mode

    def forward(self, x):
        z = self.net(x)
        return self.f(z) if self.mode in (None, self.training) else z


class Output(dict):
    "Keys that are attributes too, as a library of language models returns them."
    logits = property(lambda self: self['logits'])


@pytest.mark.parametrize('mode, where', [(None, ''), (False, ''), (True, ' in training mode')])
@pytest.mark.parametrize('f, what', [
    (lambda z: (z, z), 'a tuple of 2 values{}.*such as module\\(x\\)\\[0\\]'),
    (lambda z: [z], 'a list of 1 values{}'),
    (lambda z: dict(loss=z, logits=z), r"a dict with the keys \['loss', 'logits'\]{}.*\['logits'\]"),
    (lambda z: Output(logits=z), r"a Output with the keys \['logits'\]{}"),
    (lambda z: z.detach().numpy(), 'an object of type ndarray{}'),
    (lambda z: None, 'None{}')])
def test_what_a_network_returns_is_named(f, what, mode, where):
    with pytest.raises(ValueError, match='module returns ' + what.format(where)):
        network(Returns(f, mode)).fit(DIGITS[:40], DIGIT[:40])
    with pytest.raises(ValueError, match='module returns ' + what.format(where)):
        shard(DIGITS[:40], DIGIT[:40], module=Returns(f, mode))


@pytest.mark.parametrize('f, words', [
    (lambda z: z[:, 0], r'got \(2,\)'), (lambda z: torch.cat([z, z, z], 1), r'got \(2, 3\)'),
    (lambda z: z.mean(), r'got \(\)'), (lambda z: z.detach(), 'cannot be trained'),
    (lambda z: z.argmax(1, keepdim=True), 'cannot be trained'), (lambda z: 1 / 0 * z, 'division by zero')])
def test_outputs_that_cannot_be_trained(f, words):
    with pytest.raises(ValueError, match=words):
        network(Returns(f)).fit(DIGITS[:40], DIGIT[:40])


def test_compiled_modules():
    for module in (torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 1))),
                   torch.jit.trace(digits_cnn(), torch.zeros(2, 1, 8, 8))):
        with pytest.raises(ValueError, match='torch.jit.*pass the Python module'):
            network(module).fit(DIGITS[:40], DIGIT[:40])


NORMED = {'1d': lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
          '2d': lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 1))}


@pytest.mark.parametrize('kind', NORMED)
@pytest.mark.parametrize('n, batch_size', [(97, 32), (33, 16), (40, 1), (41, 20), (97, 96)])
@pytest.mark.parametrize('stack', ['auto', 1, 3])
def test_a_last_batch_of_one_row(kind, n, batch_size, stack):
    "The batch_size that the message offers works."
    with pytest.raises(ValueError, match=f'batches of {batch_size} leave a single row of {n}.*Group') as e:
        network(NORMED[kind], batch_size=batch_size, stack=stack).fit(DIGITS[:n], DIGIT[:n])
    other = int(str(e.value).split('for example ')[1].split(',')[0])
    network(NORMED[kind], batch_size=other, stack=stack, n_estimators=3).fit(DIGITS[:n], DIGIT[:n])


def test_single_rows_that_do_no_harm():
    wide = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1))
    for module in (wide, digits_cnn()):
        spec = TrainSpec(module, GaussianNoise(1.), batch_size=32, device='cpu')
        check_network(resolved(spec), DIGITS[:97])


def test_trying_a_network_leaves_it_and_the_generator_alone():
    module = NORMED['1d']()
    module[2].register_buffer('calls', torch.zeros(()))
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.random.get_rng_state()
    check_network(resolved(TrainSpec(module, GaussianNoise(1.), device='cpu')), DIGITS[:96])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()) and module.training
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- stacks -------------------------------------------------------------------------------------

class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells, self.last = kind(8, 6, batch_first=True), nn.Linear(6, 1)

    def forward(self, x): return self.last(self.cells(x[:, 0])[0][:, -1])


dense = lambda wrap: nn.Sequential(nn.Flatten(), wrap(nn.Linear(64, 8)), nn.ReLU(), nn.Linear(8, 1))
UNSTACKABLE = {'LSTM': partial(Recurrent, nn.LSTM), 'GRU': partial(Recurrent, nn.GRU),
               'spectral_norm': partial(dense, parametrizations.spectral_norm),
               'old spectral_norm': partial(dense, nn.utils.spectral_norm),
               'dropout always on': lambda: Returns(lambda z: F.dropout(z, .3, training=True)),
               'noise inside': lambda: Returns(lambda z: z + .01 * torch.randn_like(z)),
               'mixes samples': lambda: Returns(lambda z: z - z.mean(0))}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', UNSTACKABLE)
def test_an_open_stack_falls_back_to_single_models(name):
    fitted, texts = said(network(UNSTACKABLE[name], epochs=3).fit, DIGITS[:100], DIGIT[:100])
    found = [t for t in texts if 'trained one at a time (stack=1 instead of 25)' in t]
    # models that draw numbers are always trained alone
    chance = name in ('dropout always on', 'noise inside')
    assert len(found) == (not chance) and fitted.spec_.stack == 1
    assert fitted.model_probabilities(DIGITS[:5]).shape == (4, 5, 2)
    alone = network(UNSTACKABLE[name], epochs=3, stack=1).fit(DIGITS[:100], DIGIT[:100])
    assert [g['hashes'] for g in alone.groups_.values()] == [g['hashes'] for g in fitted.groups_.values()]
    if chance: return
    with pytest.raises(ValueError, match='stack=1'):
        network(UNSTACKABLE[name], stack=2).fit(DIGITS[:100], DIGIT[:100])
    with pytest.warns(UserWarning, match='one at a time'):
        assert len(shard(DIGITS[:50], DIGIT[:50], module=UNSTACKABLE[name])['hashes']) == 1


def test_an_open_stack_that_works_is_kept():
    fitted, texts = said(network(digits_cnn, epochs=9).fit, DIGITS[:100], DIGIT[:100])
    assert fitted.spec_.stack == 25 and texts == []


# ---- devices ------------------------------------------------------------------------------------

ABSENT = pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')


@pytest.mark.parametrize('device', ['cpu', 'cpu:0', torch.device('cpu')])
def test_the_cpu_by_every_name(device):
    expected = network(digits_cnn).fit(DIGITS[:40], DIGIT[:40])
    fitted = network(digits_cnn, device=device).fit(DIGITS[:40], DIGIT[:40])
    assert fitted.spec_.device == 'cpu' and fitted.groups_[0]['hashes'] == expected.groups_[0]['hashes']
    assert SmoothedKNNClassifier(device=device).fit(NUMBERS, Y).score(NUMBERS, Y) > .9


@pytest.mark.parametrize('device', ['mps', 'gpu', 'CPU', '', 'xpu', 'meta', torch.device('meta'), True, 1.5,
                                    b'cpu'], ids=str)
def test_other_devices_are_refused(device):
    for model in (network(digits_cnn, device=device), SmoothedKNNClassifier(device=device)):
        with pytest.raises(ValueError, match="device must be 'cpu', 'cuda'"):
            model.fit(DIGITS[:40], DIGIT[:40])


@ABSENT
@pytest.mark.parametrize('device', ['cuda', 'cuda:1', torch.device('cuda')], ids=str)
@pytest.mark.parametrize('stack', ['auto', 1])
def test_an_absent_card_is_refused(device, stack):
    for model in (network(digits_cnn, device=device, stack=stack, precision='float32'),
                  SmoothedKNNClassifier(device=device)):
        with pytest.raises(ValueError, match=r"sees no CUDA device here; use device='cpu'"):
            model.fit(DIGITS[:40], DIGIT[:40])
    with pytest.raises(ValueError, match='sees no CUDA device'):
        shard(DIGITS[:40], DIGIT[:40], module=digits_cnn, device=device, stack=stack)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_card_beyond_the_last_is_refused():
    for model in (network(digits_cnn, device='cuda:99'), SmoothedKNNClassifier(device='cuda:99')):
        with pytest.raises(ValueError, match='torch sees . CUDA devices'):
            model.fit(DIGITS[:40], DIGIT[:40])
    trained = network(digits_cnn, device=torch.device('cuda')).fit(DIGITS[:40], DIGIT[:40])
    assert trained.spec_.device == 'cuda'
