"Training sets on disk, in chunks and in the millions: the same numbers, a bounded memory, and refusals."

import json
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from knn_oracles import vote_of_many
from rab_nb import bins, knn, quantised, votes
from rab_nb.knn import SmoothedKNNClassifier

torch.set_num_threads(1)
PARAMETERS = [dict(), dict(n_neighbors=3), dict(n_levels=20)]


def data(n=400, d=6, classes=3, dtype='f4', seed=0):
    rng = np.random.default_rng(seed)
    x = (20 * rng.random((n, d))).astype(dtype) / np.asarray(10 if np.dtype(dtype).kind == 'f' else 1, dtype)
    if np.dtype(dtype).kind != 'f':
        x = x.astype(dtype)
    return x, rng.integers(0, classes, n), rng.random((9, d)) * 2 * (1 if np.dtype(dtype).kind == 'f' else 10)


def mapped(tmp_path, x, mode='r'):
    np.save(tmp_path / 'x.npy', x)
    return np.load(tmp_path / 'x.npy', mmap_mode=mode)


def chunks_of(x, y, *sizes):
    ends = np.cumsum((0,) + sizes + (len(x) - sum(sizes),))
    return lambda: ((x[a:b], y[a:b]) for a, b in zip(ends, ends[1:]))


def same(found, expected):
    "Both are right to their stated errors."
    (log_p, error), (log_q, other) = found, expected
    assert (np.abs(np.expm1(log_p - log_q)) <= error + other + 1e-12).all()


@pytest.mark.parametrize('dtype', ['f2', 'f4', 'f8', '>f4', 'u1', 'i2', 'u2', 'i8'])
@pytest.mark.parametrize('parameters', PARAMETERS)
def test_disk_and_chunks_give_the_numbers_of_memory(tmp_path, parameters, dtype, monkeypatch):
    x, y, t = data(dtype=dtype)
    sigma = 0.5 if np.dtype(dtype).kind == 'f' else 5.0
    expected = SmoothedKNNClassifier(sigma=sigma, **parameters).fit(x, y).log_proba(t)
    for size in (2**22, 700):  # bytes of a piece
        monkeypatch.setattr(knn, 'PIECE_BYTES', size)
        model = SmoothedKNNClassifier(sigma=sigma, **parameters).fit(mapped(tmp_path, x), y)
        same(model.log_proba(t), expected)
        streamed = SmoothedKNNClassifier(sigma=sigma, **parameters).fit(chunks_of(x, y, 150, 7))
        same(streamed.log_proba(t), expected)
        same(streamed.log_proba(t, streamed.distances(t)), expected)
        assert model._plan.keep == streamed._plan.keep == 0 and list(model.classes_) == [0, 1, 2]
        np.testing.assert_allclose(streamed.distances(t), model.distances(t), atol=1e-9)


def test_images_on_disk_views_and_other_orders(tmp_path):
    x, y, t = data(d=12)
    expected = SmoothedKNNClassifier().fit(x, y).log_proba(t)
    disk = mapped(tmp_path, np.asfortranarray(x.reshape(400, 3, 2, 2)))
    model = SmoothedKNNClassifier().fit(disk, y)
    same(model.log_proba(t.reshape(9, 3, 2, 2)), expected)
    assert model.input_shape_ == (3, 2, 2)
    same(SmoothedKNNClassifier().fit(disk[::-1], y[::-1]).log_proba(t), expected)
    same(SmoothedKNNClassifier().fit(mapped(tmp_path, x, 'c'), y).log_proba(t), expected)


def test_a_private_map_keeps_its_changes(tmp_path):
    x, y, t = data()
    private = mapped(tmp_path, x, 'c')
    private[0] = 1.5
    changed = private.copy()
    model = SmoothedKNNClassifier().fit(private, y)
    same(model.log_proba(t), SmoothedKNNClassifier().fit(changed, y).log_proba(t))
    np.testing.assert_array_equal(private, changed)


def test_lists_of_chunks_and_text_labels():
    x, y, t = data()
    names = np.array(['b', 'a', 'c'])[y]
    model = SmoothedKNNClassifier().fit([(x[:100], names[:100].tolist()), (x[100:], names[100:])])
    assert list(model.classes_) == ['a', 'b', 'c']
    np.testing.assert_array_equal(model.predict(t), SmoothedKNNClassifier().fit(x, names).predict(t))


def spoil(x, row, value):
    x = x.copy()
    x[row, 2] = value
    return x


@pytest.mark.parametrize(
    'make,match',
    [
        (lambda x, y: chunks_of(x, y, 150)(), r'X=lambda: chunks'),
        (lambda x, y: [(x[:9], y[:9]), (x[9:, :5], y[9:])], r'X of chunk 1 has inputs of shape \(5,\)'),
        (lambda x, y: [(x[:9], y[:9]), (x[9:], y[8:])], 'y of chunk 1 should be a 1d array with one label'),
        (lambda x, y: [(x[:9], y[:9]), (x[:0], y[:0])], 'leave empty chunks out'),
        (
            lambda x, y: chunks_of(spoil(x, 77, np.nan), y, *[10] * 9),
            r'NaN or infinity in 1 of 400 rows, .* row 77 \(row 7 of chunk 7\)',
        ),
        (lambda x, y: chunks_of(spoil(x, 77, -np.inf), y, *[10] * 9), r'-inf in row 77 \(row 7 of chunk 7\)'),
        (lambda x, y: [(x[:9], y[:9]), (x[9:], y[9:].astype(str))], 'labels of one type'),
        (lambda x, y: lambda: x, 'pair'),
        (lambda x, y: lambda: iter(()), 'no chunks'),
        (lambda x, y: x, 'y should be a 1d array'),
        (lambda x, y: [(x.astype('U5'), y)], 'numbers'),
        (lambda x, y: [(x.astype(float).astype(complex), y)], 'real numbers'),
        (lambda x, y: [(np.full((2, 3), 2**60), [0, 1])], r'feature 0 of row 0 \(row 0 of chunk 0\)'),
        (
            lambda x, y: chunks_of(spoil(x.astype('f8'), 77, 1e200), y, *[10] * 9),
            'feature 2 of row 77 of the training set is 1e',
        ),
    ],
)
def test_bad_chunks(make, match):
    x, y, _ = data()
    model = SmoothedKNNClassifier()
    with pytest.raises(ValueError, match=match):
        model.fit(make(x, y))
    assert not hasattr(model, 'classes_')


def test_labels_come_once():
    x, y, _ = data()
    with pytest.raises(ValueError, match='y must be None'):
        SmoothedKNNClassifier().fit(chunks_of(x, y, 9), y)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_bad_rows_on_disk_are_named(tmp_path, value):
    x, y, _ = data()
    with pytest.raises(ValueError, match='1 of 400 rows, the first is .* in row 377'):
        SmoothedKNNClassifier().fit(mapped(tmp_path, spoil(x, 377, value)), y)
    with pytest.raises(ValueError, match='one label for each of the 400'):
        SmoothedKNNClassifier().fit(mapped(tmp_path, x), y[:9])


def test_a_training_set_that_changes_is_refused(tmp_path):
    x, y, t = data()
    model = SmoothedKNNClassifier().fit(mapped(tmp_path, x), y)
    time.sleep(0.02)
    np.save(tmp_path / 'x.npy', x[::-1])
    with pytest.raises(ValueError, match='has changed since fit.*fit again'):
        model.predict(t)
    (tmp_path / 'x.npy').unlink()
    with pytest.raises(ValueError, match='cannot be read any more'):
        model.predict(t)

    writable = mapped(tmp_path, x, 'r+')
    model = SmoothedKNNClassifier().fit(writable, y)
    writable[5] += 1
    with pytest.raises(ValueError, match='has changed since fit'):
        model.predict(t)

    state = dict(x=x.copy(), y=y)
    model = SmoothedKNNClassifier().fit(
        lambda: [(state['x'][:100], state['y'][:100]), (state['x'][100:], state['y'][100:])]
    )
    model.predict(t)
    state['x'][7, 0] += 1
    with pytest.raises(ValueError, match='has changed since fit'):
        model.predict(t)
    state.update(x=x[:300], y=y[:300])
    with pytest.raises(ValueError, match='chunk 1: X brings other chunks than it did in fit'):
        model.predict(t)


@pytest.mark.parametrize('parameters', PARAMETERS)
def test_the_number_of_threads_changes_no_bit(parameters, tmp_path):
    x, y, _ = data(3000)
    t = np.random.default_rng(1).random((150, 6)) * 2
    for rows in (x, mapped(tmp_path, x)):
        found = [SmoothedKNNClassifier(n_jobs=j, **parameters).fit(rows, y).log_proba(t) for j in (1, 2, 5)]
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize('max_memory', [0, -1, 1.5, True, 'much', 1000])
def test_bad_budgets(max_memory):
    x, y, _ = data()
    with pytest.raises(ValueError, match='max_memory'):
        SmoothedKNNClassifier(max_memory=max_memory).fit(x, y)


@pytest.mark.parametrize('parameters', PARAMETERS)
def test_budgets_change_nothing(parameters):
    x, y, t = data()
    expected = SmoothedKNNClassifier(**parameters).fit(x, y).log_proba(t)
    for budget in (2**16 + 400 * 128, 2**18, 2**24):
        same(SmoothedKNNClassifier(max_memory=budget, **parameters).fit(x, y).log_proba(t), expected)


SCRIPT = """
    import json, resource, sys
    import numpy as np, torch
    from rab_nb.knn import SmoothedKNNClassifier
    torch.set_num_threads(1)
    path, kind, budget, parameters = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    small = np.random.default_rng(0).random((300, 64))
    SmoothedKNNClassifier(sigma=.5, **parameters).fit(small, np.arange(300) % 2).predict(small[:4])
    x = np.load(path, mmap_mode='r')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y = np.arange(len(x)) % 2
    chunks = lambda: ((x[k:k + 5000], y[k:k + 5000]) for k in range(0, len(x), 5000))
    model = SmoothedKNNClassifier(sigma=.5, max_memory=budget, n_jobs=2, **parameters)
    model.fit(x, y) if kind == 'disk' else model.fit(chunks)
    model.certify(np.random.default_rng(1).random((20, 64)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss is in KiB on Linux alone')
@pytest.mark.parametrize(
    'kind,parameters',
    [('disk', dict()), ('chunks', dict()), ('disk', dict(n_neighbors=5)), ('disk', dict(n_levels=20))],
)
def test_peak_memory_stays_within_the_budget(tmp_path, kind, parameters):
    "A file of 200 MB and a budget of 64 MiB, in a process of its own; 16 MiB are left for tables."
    n, budget = 400_000, 2**26
    x = np.lib.format.open_memmap(tmp_path / 'big.npy', 'w+', np.float64, (n, 64))
    rng = np.random.default_rng(0)
    for k in range(0, n, 20_000):
        x[k : k + 20_000] = rng.random((20_000, 64))
    x.flush()
    command = [
        sys.executable,
        '-c',
        textwrap.dedent(SCRIPT),
        str(tmp_path / 'big.npy'),
        kind,
        str(budget),
        json.dumps(parameters),
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'), check=False
    )
    assert run.returncode == 0, run.stderr
    assert 1024 * int(run.stdout) < budget + 2**24, run.stdout
    del x


def exact_by_points(s, y, d, u_low, u_high, nodes=400):
    from scipy.stats import ncx2

    u, w = np.polynomial.legendre.leggauss(nodes)
    u, w = (u_low + u_high) / 2 + (u_high - u_low) / 2 * u, w * (u_high - u_low) / 2
    log_s, h = np.zeros(nodes), np.zeros((2, nodes))
    for c in (0, 1):
        for part in np.array_split(s[y == c], 40):
            S = ncx2.sf(u * u, d, part[:, None] ** 2)
            log_s += np.log(S).sum(0)
            h[c] += (2 * u * ncx2.pdf(u * u, d, part[:, None] ** 2) / S).sum(0)
    return (h * np.exp(log_s)) @ w


@pytest.mark.slow
@pytest.mark.parametrize('order', ['in turns', 'sorted'])
def test_cells_of_many_points_against_sums_over_all(order):
    "20,000 points, where cells replace the moments of bins: scipy's distribution functions, point by point."
    rng, n, d = np.random.default_rng(5), 20_000, 12
    x, y = rng.normal(size=(n, d)), np.arange(n) % 2
    x[y == 1] *= 0.96
    if order == 'sorted':
        x, y = x[y.argsort(kind='stable')], np.sort(y)
    t = rng.normal(size=(2, d)) * 0.7
    log_p, error = SmoothedKNNClassifier().fit(x, y).log_proba(t)
    for j in (0, 1):
        s = np.linalg.norm(x - t[j], axis=1)
        exact = exact_by_points(s, y, d, 0.05, 4.0)
        assert abs(exact.sum() - 1) < 1e-9
        assert (np.abs(np.exp(log_p[j]) - exact) <= error[j] * exact + 1e-11).all() and error.max() < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize('k', [2, 5])
def test_votes_of_many_points_with_cells(k):
    rng, n, d = np.random.default_rng(6), 12_000, 8
    x, y, t = rng.normal(size=(n, d)), np.arange(n) % 2, rng.normal(size=(1, d)) * 0.5
    log_p, error = SmoothedKNNClassifier(k).fit(x, y).log_proba(t)
    exact = vote_of_many(np.linalg.norm(x - t, axis=1), y, 2, d, k)
    assert (np.abs(np.exp(log_p[0]) - exact) <= error[0] * exact + 1e-8).all() and error.max() < 1e-6


def test_cells_and_bins_agree(monkeypatch):
    "The same certificates with cells forced and forbidden, on distances that cells find hard."
    rng = np.random.default_rng(7)
    for d, scale in ((1, 3.0), (2, 1.0), (50, 0.2)):
        x = np.concatenate([np.zeros((500, d)), scale * rng.normal(size=(3500, d))])
        y, t = (
            rng.integers(0, 3, 4000),
            np.concatenate([np.zeros((1, d)), np.full((1, d), 2 * scale), np.full((1, d), 6 * scale)]),
        )
        found = []
        for cells in (1, 10**9):
            real = bins.weights_at_nodes

            def forced(s, y, C, first, n_bins, p, q, cells=cells):
                if cells > 1:
                    return bins.node_weights(bins.bin_moments(s, y, C, first, n_bins, p)), 0
                return bins.weights_by_cells(s, y, C, first, n_bins, p, q), q

            for module in (knn, votes, quantised):
                monkeypatch.setattr(module, 'weights_at_nodes', forced)
            found.append([SmoothedKNNClassifier(k).fit(x, y).log_proba(t) for k in (1, 3)])
            for module in (knn, votes, quantised):
                monkeypatch.setattr(module, 'weights_at_nodes', real)
        for a, b in zip(*found):
            same(a, b)


@pytest.mark.parametrize('device', ['cuda', 'cuda:3'])
def test_a_gpu_that_is_not_there(device, monkeypatch):
    x, y, t = data()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match='sees no CUDA device here'):
        SmoothedKNNClassifier(device=device).fit(x, y)
    assert SmoothedKNNClassifier(device='auto').fit(x, y)._centre.device.type == 'cpu'
    with pytest.raises(ValueError, match='device must be'):
        SmoothedKNNClassifier(device='tpu').fit(x, y)


@pytest.mark.parametrize('parameters', [dict(), dict(n_neighbors=3), dict(n_neighbors=40), dict(n_levels=20)])
@pytest.mark.parametrize('n', [300, 12_000])
def test_the_route_of_a_gpu_on_the_memory_of_the_host(parameters, n, monkeypatch, tmp_path):
    "No operation of numpy on tensors, and pieces of a GPU's size: all that differs but the device itself."
    x, y, t = data(n)
    expected = SmoothedKNNClassifier(**parameters).fit(x, y).log_proba(t)
    monkeypatch.setattr(bins, 'HOSTS', ())
    for rows in (x, mapped(tmp_path, x)):
        model = SmoothedKNNClassifier(**parameters).fit(rows, y)
        same(model.log_proba(t), expected)
        same(model.log_proba(t, model.distances(t)), expected)


def test_tf32_and_lower_precision_do_not_matter():
    x, y, t = data()
    expected = SmoothedKNNClassifier().fit(x, y).log_proba(t)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        np.testing.assert_array_equal(SmoothedKNNClassifier().fit(x, y).log_proba(t)[0], expected[0])
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize('order', ['in turns', 'by chance', 'sorted'])
def test_quantised_increments_by_cells(order, monkeypatch):
    "Cubics of cells against the panels' polynomials, with the classes in several orders."
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6000, 9)), np.arange(6000) % 2
    if order != 'in turns':
        y = rng.permutation(y)
    if order == 'sorted':
        y = np.sort(y)
    t = rng.normal(size=(3, 9))
    found = []
    for many in (0.01, 1e9):
        monkeypatch.setattr(quantised, 'MANY_ROWS', many)
        found.append(SmoothedKNNClassifier(n_levels=200).fit(x, y).log_proba(t))
    same(*found)
