"Training and voting of the smoothed ensemble, against plain PyTorch loops and against itself"
import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

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
from rab_nb.ensemble import RABClassifier, TrainSpec, batches, resolved, train_shard
from rab_nb.noise import GaussianNoise, UniformNoise, generator

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
        for i in batches(s, epoch, len(x)):
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
        net = plain_loop(ensemble.initial_module(make, 0), s, x, y, k)
        for name, p in net.state_dict().items():
            assert np.abs(shard['models'][name][k] - p.numpy()).max() < 2e-4, (name, k)


def test_answers_are_f_at_x_plus_u_with_u_from_the_hash_of_f():
    s = spec(stack=1)
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


def test_noise_drawn_by_row_is_fixed_over_epochs(monkeypatch):
    monkeypatch.setattr(ensemble, 'STORED_BYTES', dict(cpu=0))
    rows = torch.zeros(6, 5)
    get = ensemble.smoothed_rows(spec(), rows, [2, 3])
    a, b = get(torch.tensor([1, 4])), get(torch.tensor([4, 0]))
    assert torch.equal(a[:, 1], b[:, 0]) and a.unique().numel() == a.numel()
    p = train_shard(spec(), X[:50], Y[:50], dict(test=X[60:70]), range(4))['probabilities']['test']
    assert np.array_equal(p, train_shard(spec(), X[:50], Y[:50], dict(test=X[60:70]), range(4))['probabilities']['test'])


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
    with pytest.raises(ValueError, match=r'trained on \(1, 8, 8\)'): clf.predict(X[:5, :, :7])
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_trains_the_same_networks_up_to_rounding():
    here, there = resolved(spec(precision='float32')), resolved(spec(device='cuda', precision='float32'))
    rows = ensemble.to_rows(X[:100])
    z = torch.stack([rows + GaussianNoise(.5).sample(rows.shape, generator(0, 'train-noise', k)) for k in range(4)])
    states = []
    for s in (here, there):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(ensemble, 'smoothed_rows', lambda spec, rows, models: lambda i: z.to(rows.device)[:, i])
            states.append(ensemble.state(ensemble.train(s, X[:100], Y[:100], range(4), lambda e, s: None)))
    for k in states[0]: torch.testing.assert_close(states[0][k], states[1][k].cpu(), atol=2e-4, rtol=0)


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
