"""Provable robustness against backdoor attacks (RAB). What users import stands here; each name is fetched when it is first asked for."""
__version__ = "0.1.0"

_ROOMS = dict(
    RABClassifier='ensemble', SmoothedEnsembleClassifier='estimators', SmoothedKNNClassifier='knn',
    GaussianNoise='noise', UniformNoise='noise', LaplaceNoise='noise', DPSGD='dp',
    Certificate='certificate', certify='certificate',
    prediction_accuracy='metrics', certified_rate='metrics', certified_accuracy='metrics',
    clean_accuracy='metrics', attack_success_rate='metrics',
    OnePixel='attacks', FourPixel='attacks', Blending='attacks', poison='attacks',
    from_arrays='data', from_folder='data',
    certify_pipeline='evaluation', CertifiedAccuracyScorer='evaluation', CertifiedAccuracyDisplay='evaluation')
__all__ = ['__version__', *_ROOMS]


def __getattr__(name):
    if name not in _ROOMS: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_ROOMS[name]}'), name)


def __dir__():
    return sorted({*globals(), *_ROOMS})
