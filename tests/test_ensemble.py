"Training and voting of the smoothed ensemble, against plain PyTorch loops and against itself"
import ast
import hashlib
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score

from rab_nb import ensemble, models
from rab_nb.attacks import OnePixel, poison
from rab_nb.data import load
from rab_nb.dp import DPSGD
from rab_nb.ensemble import RABClassifier, TrainSpec, batches, resolved, train_shard
from rab_nb.noise import GaussianNoise, LaplaceNoise, UniformNoise, generator
from rab_nb.stacked import check_independence

ROOT = Path(__file__).parents[1]


def digits(n_classes=2):
    x, y = load_digits(n_class=n_classes, return_X_y=True)
    return (x.reshape(-1, 1, 8, 8) / 16).astype(np.float32), y


X, Y = digits()
SETTINGS = dict(epochs=2, batch_size=32, lr=3e-3, device='cpu')


def spec(**changes):
    return TrainSpec(**(dict(module=models.digits_cnn, noise=GaussianNoise(.5), stack=4) | SETTINGS | changes))


def classifier(**changes):
    settings = dict(module=models.digits_cnn, noise=GaussianNoise(.5), n_estimators=10, stack=4, n_jobs=1) | SETTINGS
    return RABClassifier(**(settings | changes))


def probabilities(clf, **fit):
    return clf.fit(X[:100], Y[:100], **fit).model_probabilities(X[200:220])


def plain_loop(net, s, x, y, k):
    "Algorithm 1 for one model, written as an ordinary PyTorch script."
    flat = torch.from_numpy(x).permute(0, 2, 3, 1).reshape(len(x), -1)
    z = s.noise.sample(flat.shape, generator(s.random_state, 'train-noise', k))
    data = (flat + z).view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2).contiguous()
    target, optimiser = torch.from_numpy(np.asarray(y, dtype=np.float32)), torch.optim.Adam(net.parameters(), lr=s.lr)
    for epoch in range(s.epochs):
        net.train()
        for i in batches(s, k, epoch, len(x)):
            optimiser.zero_grad()
            F.binary_cross_entropy_with_logits(net(data[i])[:, 0], target[i]).backward()
            optimiser.step()
    return net


def with_batch_norm():
    "Without a bias in front of the normalisation: its gradient is zero, and Adam would turn rounding errors into steps."
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))


@pytest.mark.parametrize('stack', [1, 3])
@pytest.mark.parametrize('make, shape', [
    (models.digits_cnn, (1, 8, 8)), (lambda: models.mlp(64), (1, 8, 8)), (models.photos_cnn, (3, 16, 16)), (models.mnist_cnn, (1, 28, 28)),
    (with_batch_norm, (3, 8, 8)), (lambda: models.small_resnet(norm='group'), (3, 16, 16)),
    (lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 1)), (1, 8, 8))])
def test_training_is_that_of_a_plain_loop(make, shape, stack):
    rng = np.random.default_rng(0)
    x, y = rng.random((24, *shape), dtype=np.float32), rng.integers(0, 2, 24)
    s = resolved(spec(module=make, stack=stack, precision='float32', batch_size=8, lr=1e-3))
    shard = train_shard(s, x, y, dict(train=x), range(3), keep_models=True)
    for k in range(3):
        net = plain_loop(ensemble.initial_module(make, 0, k), s, x, y, k)
        for name, p in net.state_dict().items():
            assert np.abs(shard['models'][name][k] - p.numpy()).max() < 2e-4, (name, k)


def test_answers_are_f_at_x_plus_u_with_u_from_the_hash_of_f():
    s = spec(stack=1, test_noise='hash')
    shard = train_shard(s, X[:50], Y[:50], dict(test=X[60:70]), [0], keep_models=True)
    state = {k: torch.from_numpy(v[0]) for k, v in shard['models'].items()}
    digest = hashlib.sha256(b''.join(v.numpy().tobytes() for v in state.values())).hexdigest()
    assert shard['hashes'] == [digest]
    u = s.noise.sample((1, 64), generator(int(digest, 16), 'test-noise')).view(1, 1, 8, 8)
    net = models.digits_cnn()
    net.load_state_dict(state)
    p = torch.sigmoid(net(torch.from_numpy(X[60:70]) + u))[:, 0].detach().numpy()
    np.testing.assert_allclose(shard['probabilities']['test'][0, :, 1], p, atol=1e-6)
    quiet = train_shard(spec(stack=1, test_noise='none'), X[:50], Y[:50], dict(test=X[60:70]), [0])
    np.testing.assert_allclose(quiet['probabilities']['test'][0, :, 1], torch.sigmoid(net(torch.from_numpy(X[60:70])))[:, 0].detach().numpy(), atol=1e-6)
    assert np.abs(quiet['probabilities']['test'] - shard['probabilities']['test']).max() > 1e-3


def test_another_training_set_gives_another_hash_and_u():
    a = train_shard(spec(), X[:50], Y[:50], {}, range(4))['hashes']
    other = X[:50].copy()
    other[0, 0, 3, 3] += 1e-3
    b = train_shard(spec(), other, Y[:50], {}, range(4))['hashes']
    assert not set(a) & set(b) and len(set(a)) == 4


def test_bits_do_not_depend_on_order_subset_or_size():
    evals = dict(test=X[200:220])
    whole = train_shard(spec(), X[:100], Y[:100], evals, range(8))
    again = train_shard(spec(), X[:100], Y[:100], evals, [6, 1, 5])
    assert np.array_equal(again['probabilities']['test'], whole['probabilities']['test'][[6, 1, 5]])
    assert again['hashes'] == [whole['hashes'][k] for k in (6, 1, 5)]


@pytest.mark.parametrize('stack', [1, 4])
def test_bits_do_not_depend_on_workers(stack):
    one = probabilities(classifier(n_jobs=1, stack=stack))
    two = probabilities(classifier(n_jobs=2, stack=stack))
    automatic = probabilities(classifier(n_jobs=None, stack=stack))
    assert np.array_equal(one, two) and np.array_equal(one, automatic)


def test_bits_do_not_depend_on_global_state():
    torch.manual_seed(1)
    a, before = probabilities(classifier()), torch.random.get_rng_state()
    np.random.seed(7)
    torch.manual_seed(2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    b = probabilities(classifier())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert np.array_equal(a, b)
    torch.manual_seed(1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_interrupted_and_resumed_is_uninterrupted(monkeypatch):
    whole, real, calls = probabilities(classifier()), ensemble.train_group, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(ensemble, 'train_group', interrupted)
    clf = classifier(warm_start=True)
    with pytest.raises(KeyboardInterrupt): probabilities(clf)
    assert np.array_equal(clf.model_probabilities(X[200:220]), whole[:4])
    assert np.array_equal(probabilities(clf), whole)
    assert len(calls) == 4


INTERRUPTED = '''
import os, signal, sys, threading, time
sys.path.insert(0, {folder!r})
from test_ensemble import X, Y, classifier

def stop(clf):
    while len(getattr(clf, 'groups_', ())) < 3: time.sleep(.02)
    os.killpg(os.getpgrp(), signal.SIGINT)

if __name__ == '__main__':
    clf = classifier(n_estimators=40, epochs=30, stack=1, n_jobs=2, warm_start=True)
    threading.Thread(target=stop, args=(clf,), daemon=True).start()
    try: clf.fit(X[:240], Y[:240])
    except KeyboardInterrupt: print('interrupted')
    part, numbers = clf.model_probabilities(X[240:260]), sorted(clf.groups_)
    whole = clf.fit(X[:240], Y[:240]).model_probabilities(X[240:260])
    print(3 <= len(part) < 40 == len(whole), (part == whole[numbers]).all())
'''


@pytest.mark.slow
def test_stop_button_with_worker_processes(tmp_path):
    script = tmp_path / 'interrupted.py'
    script.write_text(INTERRUPTED.format(folder=str(Path(__file__).parent)))
    run = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True, timeout=600)
    assert run.stdout.split('\n')[:2] == ['interrupted', 'True True']


def test_progress_bar_counts_models(capsys):
    probabilities(classifier(verbose=True))
    assert '10/10' in capsys.readouterr().err
    probabilities(classifier())
    assert capsys.readouterr().err == ''


def test_warm_start_adds_models_and_starts_over_on_other_data():
    clf = classifier(n_estimators=4, warm_start=True)
    first = probabilities(clf)
    more = probabilities(clf.set_params(n_estimators=10))
    assert np.array_equal(more[:4], first) and np.array_equal(more, probabilities(classifier()))
    other = clf.fit(X[50:150], Y[50:150]).model_probabilities(X[200:220])
    assert np.array_equal(other, classifier().fit(X[50:150], Y[50:150]).model_probabilities(X[200:220]))


def test_snapshots_are_shorter_trainings():
    evals = dict(test=X[200:220])
    long = train_shard(spec(epochs=3, snapshots=(1, 2)), X[:100], Y[:100], evals, range(4))['probabilities']
    for e in (1, 2):
        short = train_shard(spec(epochs=e), X[:100], Y[:100], evals, range(4))['probabilities']['test']
        assert np.array_equal(long[f'test@{e}'], short)


@pytest.mark.parametrize('noise', [GaussianNoise(.5), UniformNoise(-1., 1.), LaplaceNoise(.3)])
@pytest.mark.parametrize('whole', [ensemble.WHOLE, 10])
def test_noise_kept_and_noise_drawn_again_are_the_same_bits(noise, whole, monkeypatch):
    "Whole draws and one stream per row; the smallest bound holds one batch, and the last batch of an epoch is smaller."
    monkeypatch.setattr(ensemble, 'WHOLE', whole)
    s, evals = resolved(spec(noise=noise)), dict(test=X[60:70])
    kept = train_shard(s, X[:50], Y[:50], evals, range(4))
    need, batch = ensemble.group_bytes(s, 50, (1, 8, 8)), 4 * 4 * 32 * 64
    monkeypatch.setattr(ensemble, 'smoothed_rows', counted := Counted(ensemble.smoothed_rows))
    drawn = train_shard(replace(s, max_memory=need + batch), X[:50], Y[:50], evals, range(4))
    assert counted.calls == 4  # two batches in each of two epochs
    assert np.array_equal(kept['probabilities']['test'], drawn['probabilities']['test']) and kept['hashes'] == drawn['hashes']


class Counted:
    def __init__(self, f): self.f, self.calls = f, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.f(*args, **kwargs)


def test_noise_does_not_depend_on_the_stack():
    rows = torch.rand(20, 9)
    alone, together = (ensemble.smoothed_rows(resolved(spec(stack=m)), rows, range(m)) for m in (1, 7))
    assert torch.equal(alone[0], together[0])


def test_max_memory_is_no_part_of_a_runs_identity():
    assert ensemble.identity(spec(max_memory=10**9)) == ensemble.identity(spec())
    assert 'max_memory' not in repr(spec(max_memory=10**9))
    bounded = classifier(max_memory=10**7)
    assert np.array_equal(probabilities(bounded), probabilities(classifier()))
    assert bounded.spec_.max_memory == 10**7
    for bad in (0, -1, 1.5, '2GB'):
        with pytest.raises(ValueError, match='max_memory'): spec(max_memory=bad)
    with pytest.raises(ValueError, match=r'more than max_memory = 1,000; allow more, or give a smaller stack'): probabilities(classifier(max_memory=1000))


PEAK = """
import re, sys
sys.path.insert(0, {folder!r})
from test_ensemble import *
from rab_nb.ensemble import group_bytes

def status(key): return 1024 * int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1])

n, shape, s = {n}, {shape}, resolved(spec(module={module}, stack={stack}, batch_size={batch_size}, epochs=1))
x, y = np.random.default_rng(0).random((n, *shape), dtype=np.float32), np.arange(n) % 2
train_shard(replace(s, stack=1), x[:4], y[:4], {{}}, [0])
need, noise, batch = group_bytes(s, n, shape), 4 * x.size * s.stack, 4 * s.stack * s.batch_size * x[0].size
for limit in (None, need + 2 * batch):
    open('/proc/self/clear_refs', 'w').write('5')
    before = status('VmRSS')
    train_shard(replace(s, max_memory=limit), x, y, dict(test=x[:600]), range(s.stack))
    print(status('VmHWM') - before, need + noise if limit is None else limit)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='reads the peak memory from /proc')
@pytest.mark.parametrize('module, stack, n, shape, batch_size', [
    ('models.mnist_cnn', 8, 600, (1, 28, 28), 128), ('lambda: models.mlp(784, width=8)', 10, 10_000, (1, 28, 28), 256),
    ('models.small_resnet', 3, 400, (3, 32, 32), 64)])
def test_peak_memory_is_what_was_estimated_and_allowed(module, stack, n, shape, batch_size):
    "Within a factor of two, and for a data set whose noise is most of it, the bound halves the peak at least."
    script = PEAK.format(folder=str(Path(__file__).parent), module=module, stack=stack, n=n, shape=shape, batch_size=batch_size)
    run = subprocess.run([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    (peak, estimate), (bounded, limit) = (map(int, line.split()) for line in run.stdout.splitlines())
    assert estimate / 2 < peak < 2 * estimate and bounded < 2 * limit
    if n == 10_000: assert bounded < peak / 2


def test_too_little_memory_names_the_remedies(monkeypatch):
    def full(*args): raise error
    monkeypatch.setattr(ensemble, 'train', full)
    for error in (torch.OutOfMemoryError('CUDA out of memory'), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()):
        with pytest.raises(MemoryError, match='4 models side by side do not fit on cpu; give a smaller stack, or max_memory'): train_shard(spec(), X[:50], Y[:50], {}, [0])
    error = RuntimeError('something else')
    with pytest.raises(RuntimeError, match='something else'): train_shard(spec(), X[:50], Y[:50], {}, [0])


@pytest.mark.parametrize('gigabytes, expected', [(150, 25), (24, 5), (2, 1)])
def test_automatic_stack_of_a_gpu_follows_its_total_memory(gigabytes, expected, monkeypatch):
    "Resnet-18 with Adam is 187 MB a model."
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=gigabytes * 10**9))
    assert ensemble.auto_stack(11_690_513, 'cuda') == expected
    assert ensemble.auto_stack(276_417, 'cuda') == 25


def test_read_only_arrays_are_copied_in_silence(tmp_path):
    x, y = X[:60].copy(), Y[:60].copy()
    x.flags.writeable = y.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        clf = classifier().fit(x, y, dict(test=x))
        p = clf.model_probabilities(x)
        clf.save(tmp_path / 'a.safetensors')
        assert np.array_equal(RABClassifier.load(tmp_path / 'a.safetensors', models.digits_cnn).model_probabilities(x), p)
        train_shard(spec(dp=DPSGD(1., 1.)), x, y, dict(test=x), [0])
    assert np.array_equal(clf.model_probabilities('test'), p)


class Mixing(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x): return self.how(x.flatten(1))


@pytest.mark.parametrize('how', [lambda x: x - x.mean(0), lambda x: x.view(4, -1), lambda x: x[[3, 2, 1, 0]], lambda x: x * x[:4].abs().sum(0),
                                 lambda x: x if len(x) == 4 else 1 / 0 * x, lambda x: x[:4]])
@pytest.mark.parametrize('scale', [1., 1e30])
def test_a_module_that_mixes_samples_is_named(how, scale):
    with pytest.raises(ValueError, match=r'cannot stack 0 \(Mixing\)'):
        check_independence(nn.Sequential(Mixing(how), nn.Linear(64, 1)), torch.from_numpy(X[:4]) * scale)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 3e38])
def test_odd_values_are_not_taken_for_mixing(value):
    x = torch.from_numpy(X[:4].copy())
    x[1] = value
    check_independence(models.digits_cnn(), x)
    check_independence(with_batch_norm(), torch.full((4, 3, 8, 8), value))
    with pytest.raises(ValueError, match='diverged'): train_shard(spec(), np.where(np.arange(50)[:, None, None, None] == 7, np.float32(np.nan), X[:50]), Y[:50], {}, [0])


def test_save_and_load(tmp_path):
    clf = classifier()
    p, path = probabilities(clf), tmp_path / 'models.safetensors'
    clf.save(path)
    back = RABClassifier.load(path, models.digits_cnn)
    assert np.array_equal(back.model_probabilities(X[200:220]), p)
    assert repr(back.noise) == repr(clf.noise) and np.array_equal(back.predict(X), clf.predict(X))
    with pytest.raises(ValueError, match='module has'): RABClassifier.load(path, lambda: models.mlp(64))
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match='damaged'): RABClassifier.load(path, models.digits_cnn)


def test_a_loaded_private_ensemble_is_still_private(tmp_path):
    path, dp = tmp_path / 'private.safetensors', DPSGD(1., .5)
    classifier(dp=dp).fit(X[:50], Y[:50]).save(path)
    assert clone(RABClassifier.load(path, models.digits_cnn, dp=dp)).dp == dp
    for other in (None, DPSGD(1., .6)):
        with pytest.raises(ValueError, match=r'were trained with dp=DPSGD\(.*noise_multiplier=0.5'): RABClassifier.load(path, models.digits_cnn, dp=other)


def test_warm_start_trains_again_what_was_not_kept():
    clf = classifier(keep_models=False, warm_start=True).fit(X[:50], Y[:50], dict(test=X[200:220]))
    before = clf.model_probabilities('test')
    clf.set_params(keep_models=True).fit(X[:50], Y[:50], dict(test=X[200:220]))
    assert np.array_equal(clf.model_probabilities(X[200:220]), before)


class Tied(nn.Module):
    "Two layers with one weight, and one layer under two names."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 1)
        self.b.weight, self.again = self.a.weight, self.a

    def forward(self, x): return self.c(torch.relu(self.again(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))))


@pytest.mark.parametrize('stack', [1, 3])
def test_shared_parameters_stay_shared(stack):
    s = resolved(spec(module=Tied, stack=stack, precision='float32'))
    trained = ensemble.train(s, X[:50], Y[:50], range(stack))
    plain, x = plain_loop(ensemble.initial_module(Tied, 0), s, X[:50], Y[:50], 0), torch.from_numpy(X[:5])
    for name, weight in plain.named_parameters(): torch.testing.assert_close(trained.weights[name].detach().reshape(-1, *weight.shape)[0], weight.detach(), atol=1e-4, rtol=0)
    torch.testing.assert_close(trained(x.expand(stack, *x.shape))[0].detach(), plain(x).detach(), atol=1e-3, rtol=0)


def test_without_models_only_the_outputs_are_kept():
    clf = classifier(keep_models=False, n_estimators=20)
    p = clf.fit(X[:100], Y[:100], eval_sets=dict(test=X[200:220])).model_probabilities('test')
    assert np.array_equal(p, probabilities(classifier(n_estimators=20)))
    assert len(clf.certify('test').prediction) == 20
    with pytest.raises(ValueError, match='keep_models=False'): clf.predict(X[200:220])
    with pytest.raises(ValueError, match="no evaluation set 'other'"): clf.predict('other')
    with pytest.raises(ValueError, match='eval_sets'): clf.fit(X[:100], Y[:100])


def test_more_than_two_classes_and_string_labels():
    x, y = digits(3)
    names = np.array(['zero', 'one', 'two'])[y]
    clf = classifier(module=lambda: models.digits_cnn(n_outputs=3), epochs=8, lr=1e-2).fit(x[:300], names[:300])
    p = clf.model_probabilities(x[300:])
    assert p.shape[2] == 3 and np.allclose(p.sum(2), 1, atol=1e-5)
    assert clf.score(x[300:], names[300:]) > .85 and set(clf.predict(x[300:])) <= set(names)
    with pytest.raises(ValueError, match='outputs of shape'): classifier().fit(x, y)
    with pytest.raises(ValueError, match=r'outputs of shape \(2, 3\) for 3 classes'): train_shard(spec(n_classes=3), x, y, {}, [0])


def test_scikit_learn_conventions():
    clf = classifier(module=lambda: models.mlp(64), n_estimators=8)
    copy = clone(clf)
    assert copy.get_params()['epochs'] == clf.epochs and not hasattr(copy, 'groups_')
    scores = cross_val_score(clf.set_params(epochs=5, lr=1e-2), X.reshape(len(X), -1), Y, cv=3)
    assert scores.min() > .85
    module = models.digits_cnn()
    start = [p.detach().clone() for p in module.parameters()]
    probabilities(classifier(module=module))
    assert all(torch.equal(a, b) for a, b in zip(start, module.parameters()))


@pytest.mark.parametrize('dtype', [np.uint8, np.int32, np.float64, bool])
def test_other_types_are_used_as_they_are(dtype):
    x = (16 * X).astype(dtype)
    a = classifier(noise=UniformNoise(-1., 1.)).fit(x[:100], Y[:100]).model_probabilities(x[200:])
    b = classifier(noise=UniformNoise(-1., 1.)).fit(x[:100].astype(np.float32), Y[:100]).model_probabilities(x[200:].astype(np.float32))
    assert np.array_equal(a, b)


@pytest.mark.parametrize('change, message', [
    (dict(epochs=0), 'epochs'), (dict(epochs=1.5), 'epochs'), (dict(batch_size=-1), 'batch_size'), (dict(lr=0), 'lr'), (dict(lr='fast'), 'lr'),
    (dict(precision='half'), 'precision'), (dict(stack=0), 'stack'), (dict(n_estimators=0), 'n_estimators'), (dict(test_noise='maybe'), 'test_noise'),
    (dict(noise=1.), 'noise'), (dict(module=3), 'module'), (dict(module=lambda: 3), 'must return an nn.Module'), (dict(module=nn.Flatten()), 'no trainable')])
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message): classifier(**change).fit(X[:50], Y[:50])


def test_bad_data():
    holes = X[:50].copy()
    holes[3, 0, 0, 0] = np.nan
    for x, y, message in [(holes, Y[:50], 'NaN'), (X[:50], Y[:49], 'one label for each'), (X[:50], np.zeros(50), 'two classes'),
                          (X[:50].astype(str), Y[:50], 'numeric'), (X[:0], Y[:0], 'non-empty'), (X[:50], np.full(50, np.nan), 'NaN')]:
        with pytest.raises(ValueError, match=message): classifier().fit(x, y)
    clf = classifier().fit(X[:50], Y[:50])
    with pytest.raises(ValueError, match=r'trained on inputs of shape \(1, 8, 8\)'): clf.predict(X[:5, :, :7])
    with pytest.raises(ValueError, match='diverged'): classifier(lr=1e30).fit(X[:50], Y[:50])


class WholeBatch:
    "The hook's protocol with neither clipping nor noise: the plain gradient."
    folded = True

    def check(self, module, n, batch_size): assert batch_size <= n

    def gradient(self, stack, x, y, loss, generators, batch_size, models, step):
        assert stack.mode == 'fold' and len(generators) == len(x) == stack.n_models
        assert len({g.initial_seed() for g in generators}) == len(generators)
        stack.flat.grad.zero_()
        loss(stack(x), y).mean(-1).sum().backward()

    def __repr__(self): return 'WholeBatch()'


def test_hook_for_private_gradients():
    a = train_shard(spec(dp=WholeBatch()), X[:100], Y[:100], {}, range(4))
    assert a['hashes'] == train_shard(spec(), X[:100], Y[:100], {}, range(4))['hashes']
    assert ensemble.identity(spec(dp=WholeBatch()))['dp'] == 'WholeBatch()'


def test_ensemble_does_not_import_its_hook():
    names = [n for node in ast.walk(ast.parse((ROOT / 'rab_nb/ensemble.py').read_text())) if isinstance(node, ast.ImportFrom) for n in [node.module]]
    assert 'dp' not in names


@pytest.fixture
def same_noise(monkeypatch):
    "CPU and CUDA draw different numbers; here both get the CPU's."
    def drawn_on_cpu(s, rows, k, i=None): return draw(s, rows.cpu(), k, i if i is None else i.cpu()).to(rows.device)
    draw = ensemble.draw_noise
    monkeypatch.setattr(ensemble, 'draw_noise', drawn_on_cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('stack', [1, 4])
@pytest.mark.parametrize('make, shape', [(models.digits_cnn, (1, 8, 8)), (models.mnist_cnn, (1, 28, 28)), (with_batch_norm, (3, 8, 8))])
def test_cuda_trains_the_same_networks_up_to_rounding(make, shape, stack, same_noise):
    rng = np.random.default_rng(0)
    x, y = rng.random((40, *shape), dtype=np.float32), rng.integers(0, 2, 40)
    states = [ensemble.state(ensemble.train(resolved(spec(module=make, device=d, precision='float32', stack=stack, lr=1e-3)), x, y, range(stack))) for d in ('cpu', 'cuda')]
    for k in states[0]: torch.testing.assert_close(states[0][k], states[1][k].cpu(), atol=5e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dp', [None, DPSGD(1., .5)])
@pytest.mark.parametrize('whole_rows', [ensemble.WHOLE, 10])
def test_cuda_resumes_and_bounds_its_memory_with_the_same_bits(dp, whole_rows, monkeypatch):
    monkeypatch.setattr(ensemble, 'WHOLE', whole_rows)
    s, evals = resolved(spec(device='cuda', dp=dp)), dict(test=X[60:70])
    whole = train_shard(s, X[:50], Y[:50], evals, range(8))
    again = train_shard(s, X[:50], Y[:50], evals, [6, 1])
    assert np.array_equal(again['probabilities']['test'], whole['probabilities']['test'][[6, 1]]) and again['hashes'][0] == whole['hashes'][6]
    bound = ensemble.group_bytes(s, 50, (1, 8, 8)) + 4 * 4 * 32 * 64
    assert train_shard(replace(s, max_memory=bound), X[:50], Y[:50], evals, range(8))['hashes'] == whole['hashes']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_steps_do_not_wait_for_the_device():
    s = resolved(spec(device='cuda', epochs=1))
    ensemble.train(s, X[:100], Y[:100], range(4))
    torch.cuda.set_sync_debug_mode('error')
    try: smoothed = ensemble.smoothed_batches(s, ensemble.to_rows(X[:100]).cuda(), (1, 8, 8), range(4))
    finally: torch.cuda.set_sync_debug_mode('default')
    stack, y = ensemble.Stack(s.module, 4, 'cuda'), torch.zeros(100, dtype=torch.int64, device='cuda')
    for step, (i, z) in enumerate(smoothed(batches(s, 0, 100))):
        torch.cuda.set_sync_debug_mode('error')
        try: ensemble.gradient(s, stack, ensemble.to_inputs(z, (1, 8, 8)), y[i], range(4), step)
        finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.slow
@pytest.mark.skipif('RAB_DATA' not in os.environ, reason='needs the real MNIST in RAB_DATA')
def test_mnist_one_pixel_has_the_p_a_that_an_independent_computation_found():
    "0.805, over several seeds: the batch order that a seed's models share moves all of them by about 0.035."
    task = poison(load('mnist', (0, 1)), OnePixel(1.), .1)
    def p_a(seed):
        clf = RABClassifier(models.mnist_cnn, GaussianNoise(1.), n_estimators=3, epochs=2, random_state=seed, keep_models=False, device='cpu')
        p = clf.fit(task.x_train, task.y_train, dict(triggered=task.x_test_triggered)).model_probabilities('triggered')
        assert p.shape == (3, 1135, 2)
        return p[..., 1].mean()
    assert abs(np.mean([p_a(seed) for seed in range(4)]) - .805) < .05
