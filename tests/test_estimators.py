"""Both classifiers against scikit-learn's own checks, and inside its tools.

They pass all of them. `test_refusals` shows that what is refused is refused with a ValueError;
`test_inputs.py` has the frames, and scikit-learn's check of their column names."""
import inspect
from functools import partial

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

import rab_nb
from rab_nb.attacks import PoisonedTask
from rab_nb.certificate import Certificate
from rab_nb.data import Task
from rab_nb.defences import BaggedClassifier, PartitionClassifier, PlainKNNClassifier, RowCertificate
from rab_nb.ensemble import RABClassifier
from rab_nb.estimators import SmoothedEnsembleClassifier
from rab_nb.evaluation import CertifiedAccuracyDisplay
from rab_nb.knn import SmoothedKNNClassifier
from rab_nb.metrics import abstention_rate, attack_success_rate, certified_accuracy, prediction_accuracy
from rab_nb.models import mlp
from rab_nb.noise import GaussianNoise

class Sized(RABClassifier):
    """RABClassifier takes a module for the data at hand; the checks bring data of many widths and numbers of
    classes, so here the module follows them."""
    def __init__(self, n_estimators=2, random_state=0):
        super().__init__(None, GaussianNoise(.2), n_estimators=n_estimators, epochs=20, batch_size=16, lr=.02,
                         random_state=random_state, device='cpu', n_jobs=1)

    @property
    def module(self):
        return partial(mlp, self.n_features_in_,
                       n_outputs=len(self.classes_) if len(self.classes_) > 2 else 1)

    @module.setter
    def module(self, value): pass


@parametrize_with_checks([SmoothedKNNClassifier(), Sized()])
def test_check_estimator(estimator, check): check(estimator)


ESTIMATORS = pytest.mark.parametrize('estimator', [SmoothedKNNClassifier(), Sized()],
                                     ids=['SmoothedKNNClassifier', 'RABClassifier'])
def halved(x): return x / 2


X, Y = np.random.default_rng(0).random((20, 3)), np.arange(20) % 2
pytestmark = pytest.mark.filterwarnings('ignore')


@ESTIMATORS
@pytest.mark.parametrize('x, y',
                         [(X + 1j, Y), (csr_array(X), Y), (X.astype(object).astype(str), Y), (X[:0], Y[:0]),
                          (X[:, 0], Y), (X, None), (X, np.stack([Y, Y], 1)), (X, Y[:9]),
                          (np.where(X < .1, np.nan, X), Y), (X, np.where(Y > 0, np.nan, 0.))],
                         ids=['complex', 'sparse', 'text', 'no rows', 'one row', 'no labels',
                              'two columns of labels', 'too few labels', 'NaN', 'NaN label'])
def test_refusals(estimator, x, y):
    with pytest.raises(ValueError):
        estimator.fit(x, y)


@ESTIMATORS
def test_a_column_of_labels_is_taken_with_a_warning(estimator):
    "As scikit-learn's own classifiers do; the models are those of the same labels in a row."
    from sklearn.exceptions import DataConversionWarning
    with pytest.warns(DataConversionWarning, match='ravel'):
        column = estimator.fit(X, Y[:, None]).predict_proba(X)
    np.testing.assert_array_equal(column, estimator.fit(X, Y).predict_proba(X))


@ESTIMATORS
def test_no_features(estimator):
    with pytest.raises(ValueError):
        estimator.fit(X[:, :0], Y)


@ESTIMATORS
def test_other_width_and_no_fit_are_refused(estimator):
    with pytest.raises((ValueError, NotFittedError)):
        type(estimator)().predict_proba(X)
    with pytest.raises(ValueError, match='3'):
        estimator.fit(X, Y).predict(X[:, :2])


def test_every_question_before_fit():
    "scikit-learn's NotFittedError, whichever method is asked first."
    for ask in ('predict', 'predict_proba', 'model_probabilities', 'certify'):
        with pytest.raises(NotFittedError):
            getattr(Sized(), ask)(X)
    with pytest.raises(NotFittedError):
        Sized().score(X, Y)
    with pytest.raises(NotFittedError):
        Sized().save('nowhere.safetensors')


@pytest.mark.parametrize('labels', [[0, 1], [False, True], ['a', 'b'], [0., 1.], [-7, 10**12]], ids=str)
def test_labels_of_every_kind_train_the_same_models(labels):
    "Strings, whole numbers and booleans are names only; a fractional target is refused."
    names = np.array(labels)
    fitted = Sized().fit(X, names[Y])
    np.testing.assert_array_equal(fitted.classes_, names)
    np.testing.assert_array_equal(fitted.predict_proba(X), Sized().fit(X, Y).predict_proba(X))
    assert set(fitted.predict(X)) <= set(labels)
    with pytest.raises(ValueError, match='continuous'):
        Sized().fit(X, Y + .5 * (Y == 0))


@pytest.mark.parametrize('labels', [[1, 2], [-1, 1], [False, True], ['a', 'b'], [1., 2.]], ids=str)
def test_certificates_of_networks_speak_the_labels_of_fit(labels):
    "The same models, votes and radii as for 0 and 1, under the names that `fit` was given."
    names, columns = np.array(labels), Sized(20).fit(X, Y).certify(X, .5)
    cert, won = Sized(20).fit(X, names[Y]).certify(X, .5), columns.prediction >= 0
    assert 0 < won.sum() < len(X) and (cert.radius == columns.radius).all()
    assert cert.labels[won].tolist() == names[columns.prediction[won]].tolist()
    assert abstention_rate(cert) == np.mean(~won)
    right = columns.prediction == Y
    for r in (0, np.median(cert.radius[won])):
        assert certified_accuracy(cert, names[Y], r) == np.mean(right & (columns.radius > r)) > 0
    assert prediction_accuracy(cert, names[Y]) == np.mean(right)
    assert attack_success_rate(cert, labels[0]) == np.mean(columns.prediction == 0)


@ESTIMATORS
def test_pipeline_grid_search_and_folds(estimator):
    """Iris: five folds, a grid over a parameter of the last step, and the certificates of the refitted
    pipeline."""
    x, y = load_iris(return_X_y=True)
    pipeline = make_pipeline(FunctionTransformer(halved), estimator)
    assert cross_val_score(pipeline, x, np.array(['a', 'b', 'c'])[y], cv=5).mean() > .75
    nearest = isinstance(estimator, SmoothedKNNClassifier)
    name, values = ('sigma', [.3, 5.]) if nearest else ('n_estimators', [20, 25])
    search = GridSearchCV(pipeline, {f'{pipeline.steps[-1][0]}__{name}': values}, cv=2).fit(x, y)
    certificate = search.best_estimator_[-1].certify(search.best_estimator_[:-1].transform(x))
    assert len(certificate) == 150
    assert (
        certificate.prediction[certificate.prediction >= 0] == search.predict(x)[
            certificate.prediction >= 0]).all()
    if name == 'sigma':
        assert search.best_params_['smoothedknnclassifier__sigma'] == .3


CLASSIFIERS = [RABClassifier, SmoothedEnsembleClassifier, SmoothedKNNClassifier, PartitionClassifier,
               BaggedClassifier, PlainKNNClassifier]
USERS = {value for name in rab_nb.__all__ if inspect.isclass(value := getattr(rab_nb, name))}
# made by functions, not by hand: what they hold are attributes
MADE = [Certificate, RowCertificate, Task, PoisonedTask, CertifiedAccuracyDisplay]
CLASSES = sorted({*CLASSIFIERS, *USERS, *MADE}, key=lambda cls: cls.__name__)


def named(section): return {name.strip(' *') for line in section.splitlines() if ' : ' in line
                            for name in line.partition(' : ')[0].split(',')}


@pytest.mark.parametrize('cls', CLASSES)
def test_help_names_every_parameter_and_attribute(cls):
    "`help` and `?` show each parameter, the attributes and an example."
    before, _, after = inspect.getdoc(cls).partition('Attributes\n')
    attributes, _, example = after.partition('Examples\n')
    assert named(attributes) and '>>> ' in example
    if cls in MADE: return
    wanted = set(inspect.signature(cls.__init__).parameters) - {'self'}
    assert named(before.partition('Parameters\n')[2]) == wanted
    if cls in CLASSIFIERS: assert {'classes_', 'n_features_in_'} <= named(attributes)


@pytest.mark.parametrize('cls', CLASSIFIERS)
def test_attributes_that_help_names_are_there(cls):
    from sklearn.neighbors import NearestCentroid
    start, noise = NearestCentroid(), GaussianNoise(.2)
    arguments = {RABClassifier: (partial(mlp, 3), noise, 2), SmoothedEnsembleClassifier: (start, noise, 2),
                 PartitionClassifier: (start, 3), BaggedClassifier: (start, 3, 4)}
    fitted = cls(*arguments.get(cls, ())).fit(X, Y)
    found = named(inspect.getdoc(cls).partition('Attributes\n')[2].partition('Examples\n')[0])
    assert [name for name in found if not hasattr(fitted, name)] == []


@pytest.mark.parametrize('cls', CLASSES)
def test_examples_of_docstrings_run(cls):
    import doctest
    [found] = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__)
    assert found.examples and not doctest.DocTestRunner().run(found).failed
