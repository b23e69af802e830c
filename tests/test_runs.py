"The run store: identities, hostile files, independent oracles and the command line."

import json
import math
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings as budget, strategies as st

from rab_nb import cli, experiments, profiles, store, workers
from rab_nb.certificate import VoteStatistics, certify, certify_statistics
from rab_nb.noise import GaussianNoise

DRILL = dict(kind='drill', n_models=7, shard_size=3, n_points=5)
TINY = dict(
    kind='dnn',
    n_models=4,
    shard_size=2,
    data=dict(name='digits', classes=[0, 1]),
    attack=dict(trigger='one_pixel', norm=1.0, rate=0.1, target=0, seed=0),
    noise='GaussianNoise(sigma=1.0)',
    module=dict(name='digits_cnn'),
    dp=None,
    train=dict(epochs=1, batch_size=32, lr=3e-3, random_state=0, precision='float32', stack=2),
)
MODULE_DEFAULTS = {
    'mnist_cnn': dict(n_outputs=1, n_channels=1),
    'coarse_cnn': dict(n_outputs=1, n_channels=1, size=28, width=8),
    'digits_cnn': dict(n_outputs=1, n_channels=1, width=16, size=8),
    'photos_cnn': dict(n_outputs=1, width=16),
    'mlp': dict(n_outputs=1, width=64),
    'preact_resnet': dict(n_outputs=1, n_blocks=5, widths=(16, 32, 64), norm='batch', stem_stride=1),
    'small_resnet': dict(n_outputs=1, stem_stride=2, norm='batch', widths=(16, 32, 64)),
    'strided_cnn': dict(n_outputs=1, width=32),
    'resnet18': dict(n_outputs=1, weights=None, norm='batch'),
    'efficientnet_lite0': dict(n_outputs=1),
}
values = st.recursive(
    st.none()
    | st.booleans()
    | st.text(max_size=5)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=8,
)


def compute(settings, store, **how):
    return workers.run(settings, store, **({'n_jobs': 1, 'device': 'cpu', 'progress': False} | how))


# ---- identity -----------------------------------------------------------------------------------
@given(st.dictionaries(st.text(max_size=3), values, max_size=4))
@budget(deadline=None, max_examples=200)
def test_canonical_survives_the_file(settings):
    "Text -> JSON -> text is the identity, and no float loses a bit."
    text = store.canonical(settings)
    assert store.canonical(json.loads(text)) == text
    back = json.loads(text)

    def same(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    assert same(settings, back)


def test_equal_settings_have_one_identity():
    assert store.run_id({'a': 1, 'b': {'c': 0.1, 'd': [1, 2]}}) == store.run_id(
        {'b': {'d': (1.0, np.int64(2)), 'c': np.float64(0.1)}, 'a': np.float32(1)}
    )


@pytest.mark.parametrize('change', [{'n_points': 6}, {'random_state': 1}, {'seconds': 1e-300}])
def test_different_settings_have_different_identities(change, tmp_path):
    assert workers.open_run(DRILL, tmp_path).id != workers.open_run(DRILL | change, tmp_path).id


@pytest.mark.parametrize(
    'change',
    [
        {'n_models': 8},
        {'shard_size': 2},
        {'module': {'name': 'digits_cnn', 'width': 16}},
        {'attack': TINY['attack'] | {'source': None}},
        {'train': TINY['train'] | {'start': 'own', 'label_noise': 0.0, 'test_sigma': None}},
        {'train': TINY['train'] | {'stack': 1}},
        {'data': TINY['data'] | {'download': True}},
    ],
)
def test_sizes_and_defaults_are_no_part_of_a_name(change, tmp_path):
    "An option that is invented tomorrow is at its default in every run of today."
    assert workers.open_run(TINY, tmp_path, 'cpu').id == workers.open_run(TINY | change, tmp_path, 'cpu').id


@pytest.mark.parametrize(
    'change',
    [
        {'train': TINY['train'] | {'epochs': 2}},
        {'train': TINY['train'] | {'label_noise': 0.1}},
        {'train': TINY['train'] | {'precision': 'bf16'}},
        {'module': {'name': 'digits_cnn', 'width': 4}},
        {'noise': 'GaussianNoise(sigma=1.5)'},
        {'data': TINY['data'] | {'random_state': 1}},
    ],
)
def test_whatever_changes_numbers_changes_the_name(change, tmp_path):
    assert workers.open_run(TINY, tmp_path, 'cpu').id != workers.open_run(TINY | change, tmp_path, 'cpu').id


def test_the_defaults_that_names_rest_on():
    """Names leave these out: whoever changes one of them gives old blocks to other runs, unless
    training.ENGINE is raised."""
    import inspect
    from rab_nb import attacks, data, training
    from rab_nb.dp import DPSGD

    defaults = lambda f: {
        k: p.default
        for k, p in inspect.signature(f).parameters.items()
        if p.default is not p.empty and k not in experiments.ALWAYS_NAMED | experiments.MACHINE_SETTINGS
    }
    assert training.ENGINE == 3
    assert defaults(training.TrainSpec) == dict(
        n_classes=2, label_noise=0.0, start='own', test_noise='stream', test_sigma=None, dp=None, snapshots=()
    )
    assert defaults(attacks.poison) == dict(source=None) and defaults(DPSGD) == dict(engine='ghost')
    assert defaults(data.load) == dict(classes=None, root=None, download=True, size=None)
    assert {name: defaults(f) for name, f in experiments.MODULES.items()} == MODULE_DEFAULTS


@pytest.mark.parametrize(
    'bad', [math.nan, math.inf, object(), {1: 2}, b'bytes', np.zeros(2), {'a': {'b': {1, 2}}}]
)
def test_settings_that_no_file_holds(bad):
    with pytest.raises(ValueError, match='settings may hold'):
        store.canonical({'x': bad})


@pytest.mark.parametrize('bad', [0, -1, 2.5, '3', None])
def test_sizes_are_checked(bad, tmp_path):
    with pytest.raises(ValueError, match='n_models and shard_size'):
        compute(DRILL | {'n_models': bad}, tmp_path)


@pytest.mark.parametrize('kind', ['os.system', 'os:system', 'rab_nb.cli:main', '__import__', None, ['drill']])
def test_settings_cannot_name_code(kind, tmp_path):
    with pytest.raises(ValueError, match='kind must be one of'):
        compute(DRILL | {'kind': kind}, tmp_path)


@pytest.mark.parametrize(
    'change',
    [
        {'module': None},
        {'data': None},
        {'attack': []},
        {'train': {'epoch': 1}},
        {'dp': {'max_grad_norms': 1}},
        {'module': {'name': 'digits_cnn', 'widht': 3}},
        {'module': {'name': 'torch.load'}},
        {'attack': TINY['attack'] | {'trigger': 'eval'}},
        {'noise': '__import__("os").system("true")'},
        {'data': {'name': '../../etc/passwd'}},
        {'train': TINY['train'] | {'lr': 'nan'}},
    ],
)
def test_hostile_ensemble_settings(change, tmp_path):
    with pytest.raises(ValueError):
        compute(TINY | change, tmp_path)


# ---- ensembles that grow ------------------------------------------------------------------------
@pytest.fixture
def asked(monkeypatch):
    "The shards that were computed."
    said, compute_one = [], workers.compute_shard
    monkeypatch.setattr(
        workers,
        'compute_shard',
        lambda kind, settings, models: (
            said.append((models.start, models.stop)) or compute_one(kind, settings, models)
        ),
    )
    return said


def test_grown_ensemble_trains_new_models_only(tmp_path, asked):
    compute(TINY, tmp_path / 'a')
    grown = compute(TINY | {'n_models': 7}, tmp_path / 'a')
    assert asked == [(0, 2), (2, 4), (4, 6), (6, 7)]
    at_once = compute(TINY | {'n_models': 7}, tmp_path / 'b')
    for name in ('triggered', 'clean', 'hashes'):
        assert np.array_equal(grown.arrays(name), at_once.arrays(name))


def test_smaller_ensemble_of_a_larger_one(tmp_path, asked):
    compute(DRILL | {'n_models': 9}, tmp_path)
    assert compute(DRILL, tmp_path).arrays('probabilities').shape == (7, 5, 2)
    assert asked == [(0, 3), (3, 6), (6, 9)]


def test_other_shards_of_the_same_models(tmp_path, asked):
    "A run goes on with another shard_size; a model that lies in two files is taken once."
    small = compute(DRILL, tmp_path)
    grown = compute(DRILL | {'n_models': 12, 'shard_size': 5}, tmp_path)
    assert asked[3:] == [(7, 10), (10, 12)]
    whole = compute(DRILL | {'n_models': 12}, tmp_path / 'b').arrays('probabilities')
    small.path(range(0, 3)).unlink()
    compute(DRILL | {'shard_size': 7}, tmp_path)
    workers.Job(grown, range(0, 12)).finish({'probabilities': whole}, {'seconds': 1.0})
    assert (grown.arrays('probabilities') == whole).all() and (
        grown.statistics('probabilities').votes == VoteStatistics.from_probabilities(whole).votes
    ).all()


@pytest.mark.parametrize('change', [{'n_points': 4}, {'random_state': 1}])
def test_nothing_is_taken_from_another_experiment(change, tmp_path, asked):
    compute(DRILL, tmp_path)
    before = len(asked)
    other = compute(DRILL | {'n_models': 8} | change, tmp_path)
    assert len(asked) - before == len(other.shards)


def test_damaged_shards_are_not_taken(tmp_path, asked):
    small = compute(DRILL, tmp_path)
    first = small.path(range(3))
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.warns(UserWarning, match='computed again'):
        compute(DRILL | {'n_models': 9}, tmp_path)
    assert asked[3:] == [(0, 3), (7, 9)]


# ---- two clients --------------------------------------------------------------------------------
def test_without_locks_the_first_file_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(store, '_locked', lambda fd: True)
    first, second = store.claim(tmp_path / 'a'), store.claim(tmp_path / 'a')
    first.commit(b'whole')
    second.commit(b'late')
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('a', b'whole')]


def test_a_result_from_the_cluster_is_kept_while_another_client_holds_the_shard(tmp_path):
    asked = workers.open_run(DRILL, tmp_path)
    store.prepare_run(asked)
    other = store.claim(asked.path(range(3)))
    workers.Job(asked, range(3)).finish({'probabilities': np.ones((3, 5, 2), np.float32)}, {})
    assert asked.read(range(3))[0]['probabilities'].shape == (3, 5, 2)
    other.release()
    assert [p.name for p in asked.folder.glob('.*')] == []


# ---- results ------------------------------------------------------------------------------------
@pytest.mark.parametrize('shard_size', [1, 2, 3, 7, 100])
def test_models_are_cut_into_shards(shard_size):
    s = DRILL | {'shard_size': shard_size}
    cut = store.portions(range(7), shard_size)
    assert [m for part in cut for m in part] == list(range(7)) and len(cut) == store.n_shards(s)


@pytest.mark.parametrize('bound', ['hoeffding', 'empirical_bernstein'])
def test_statistics_certify_like_the_outputs(bound, tmp_path):
    "Certificates from sums equal those from all models' outputs, up to the rounding that the sums state."
    r = compute(DRILL | {'n_models': 50, 'shard_size': 8}, tmp_path)
    p = np.clip(r.arrays('probabilities'), 0.7, 1)
    skewed = np.stack([p[..., 0], 1 - p[..., 0]], -1)
    stats = VoteStatistics.from_probabilities(skewed)
    np.testing.assert_allclose(
        certify_statistics(stats, GaussianNoise(1.0), bound=bound).radius,
        certify(skewed, GaussianNoise(1.0), bound=bound).radius,
        rtol=1e-12,
    )
    stored, direct = r.statistics('probabilities'), r.arrays('probabilities').astype(np.float64)
    np.testing.assert_allclose(
        stored.mean,
        [[math.fsum(direct[:, i, c]) / 50 for c in range(2)] for i in range(5)],
        atol=stored.rounding,
        rtol=0,
    )
    np.testing.assert_allclose(
        stored.second_moment,
        [[math.fsum(direct[:, i, c] ** 2) / 50 for c in range(2)] for i in range(5)],
        atol=3 * stored.rounding,
        rtol=0,
    )
    assert (stored.votes[:, 0] == (direct[..., 0] >= direct[..., 1]).sum(0)).all() and (
        stored.votes.sum(1) == 50
    ).all()


def test_statistics_do_not_depend_on_the_shards(tmp_path):
    a, b = (compute(DRILL | {'shard_size': n}, tmp_path).statistics('probabilities') for n in (2, 5))
    assert (a.mean == b.mean).all() and (a.second_moment == b.second_moment).all()


def test_statistics_refuse_what_is_no_probability(tmp_path):
    r = compute(DRILL, tmp_path)
    outputs = r.arrays('probabilities').astype(np.float32)
    outputs[3, 2, 1] = 2.0
    workers.Job(r, range(7)).finish({'probabilities': outputs}, {'seconds': 1.0})
    for shard in r.shards:
        r.path(shard).unlink()
    with pytest.raises(ValueError, match='must lie'):
        r.statistics('probabilities')


def test_ensemble_runs_are_the_classifier(tmp_path):
    "The run store and RABClassifier train the same models."
    from rab_nb.ensemble import RABClassifier
    from rab_nb.models import digits_cnn

    r, task = compute(TINY, tmp_path), experiments.poisoned_task(store.plain(TINY))
    train = {k: v for k, v in TINY['train'].items()}
    rab = RABClassifier(digits_cnn, GaussianNoise(1.0), n_estimators=4, device='cpu', n_jobs=1, **train).fit(
        task.x_train, task.y_train
    )
    np.testing.assert_array_equal(r.arrays('triggered'), rab.model_probabilities(task.x_test_triggered))


def test_worker_of_another_version_refuses(tmp_path):
    r = workers.open_run(DRILL, tmp_path)
    with pytest.raises(RuntimeError, match='this worker would compute something else'):
        workers.compute_shard(
            workers.RUN_KINDS['drill'], r.settings | {'environment': {'version': 2}}, range(3)
        )


def test_an_error_in_a_shard_is_reported_and_leaves_nothing(tmp_path):
    workers.register('broken', broken)
    for n_jobs in (1, 2):
        with pytest.raises((RuntimeError, ZeroDivisionError), match='division by zero'):
            compute(dict(kind='broken', n_models=2, shard_size=1), tmp_path, n_jobs=n_jobs)
        assert not list(tmp_path.rglob('*.part')) and not list(tmp_path.rglob('*.safetensors'))


def broken(settings, models):
    return 1 / 0


@pytest.mark.parametrize('n_jobs', [0, -2])
def test_n_jobs_is_checked(n_jobs, tmp_path):
    with pytest.raises(ValueError, match='n_jobs'):
        compute(DRILL, tmp_path, n_jobs=n_jobs)


# ---- hostile files ------------------------------------------------------------------------------
def mutated(content, rng):
    "Flip, cut, insert, repeat or overwrite; numbers in headers made absurd."
    b = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(0, len(b) + 1)), rng.integers(0, 7)
        if kind == 0 and b:
            b[at % len(b)] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del b[at:]
        elif kind == 2:
            b[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif kind == 3:
            b[at : at + 8] = (
                [0, 2**31, 2**62, 2**64 - 1][int(rng.integers(4))].to_bytes(8, 'little')
                if rng.random() < 0.5
                else rng.bytes(8)
            )
        elif kind == 4:
            b = bytearray(bytes(b).replace(b'[', b'[' + b'[' * int(rng.integers(1, 3000)), 1))
        elif kind == 5:
            b = bytearray(
                bytes(b)
                .replace(b'"shape":[', b'"shape":[9999999999999,', 1)
                .replace(b'F32', bytes(rng.choice([b'F64', b'BF16', b'I8', b'F8_E5M2'])))
            )
        elif b:
            b[0:8] = int(rng.integers(0, 2**16)).to_bytes(8, 'little')
    return bytes(b)


def test_two_thousand_hostile_files(tmp_path):
    "Shards, blocks and settings, mutated 2,000 times: the file's own content, or an error of ours."
    r = compute(DRILL, tmp_path)
    workers.keep_blocks(tmp_path / 'blocks', [r])
    second = range(3, 6)
    files = {
        r.path(second): lambda: r.read(second)[0],
        tmp_path / 'blocks': lambda: store.read_blocks(tmp_path / 'blocks')[0].sums,
        r.folder / 'settings.json': lambda: {
            'settings': np.array(store.canonical(store.read_settings(r.folder)))
        },
    }
    rng, refused = np.random.default_rng(0), 0
    for path, load in files.items():
        content, expected = path.read_bytes(), load()
        for _ in range(667):
            path.write_bytes(mutated(content, rng))
            try:
                got = load()
            except (store.ShardError, store.StatisticsError):
                refused += 1
            else:
                assert got.keys() == expected.keys() and all(
                    np.array_equal(got[k], expected[k]) for k in expected
                )
        path.write_bytes(content)
    assert refused > 1900


@pytest.mark.parametrize(
    'content',
    [
        pickle.dumps({'a': 1}),
        b'PK\x03\x04' + b'\0' * 100,
        b'\x93NUMPY' + b'\0' * 100,
        b'\x02' + b'\0' * 7 + b'{}',
        b'\x02' + b'\0' * 7 + b'[]',
        (2**62).to_bytes(8, 'little') + b'{}',
    ],
)
def test_other_formats_are_refused(content, tmp_path):
    r = compute(DRILL, tmp_path)
    r.path(range(3)).write_bytes(content)
    with pytest.raises(store.ShardError):
        r.read(range(3))
    (tmp_path / 'blocks').write_bytes(content)
    with pytest.raises(store.StatisticsError, match='Restore it'):
        workers.keep_blocks(tmp_path / 'blocks', [r])
    assert (tmp_path / 'blocks').read_bytes() == content


def test_absurd_sizes_are_refused_before_reading(tmp_path):
    "A sparse file of 1 TiB costs nothing to refuse; neither does a header that claims 2^60 values."
    import resource

    r = compute(DRILL, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, second = range(3), range(3, 6)
    os.truncate(r.path(first), 2**40)
    with pytest.raises(store.ShardError, match='more than MAX_SHARD_BYTES'):
        r.read(first)
    with pytest.raises(store.StatisticsError, match='more than MAX_SHARD_BYTES'):
        store.read_blocks(r.path(first))
    header = json.dumps({'a': {'dtype': 'F32', 'shape': [2**30, 2**30], 'data_offsets': [0, 2**62]}}).encode()
    r.path(second).write_bytes(len(header).to_bytes(8, 'little') + header)
    with pytest.raises(store.ShardError):
        r.read(second)
    os.truncate(r.folder / 'settings.json', 2**40)
    with pytest.raises(store.ShardError, match='more than'):
        store.read_settings(r.folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_a_pickle_in_the_store_is_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    r = compute(DRILL, tmp_path)
    for p in (r.path(range(3)), r.folder / 'settings.json'):
        p.write_bytes(pickle.dumps(Bomb()))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        compute(DRILL, tmp_path)
    assert not (tmp_path / 'ran').exists() and r.missing() == []


def test_a_link_in_the_store_is_not_followed(tmp_path):
    "A hidden file replaced by a symbolic link must not make a client write elsewhere."
    r = workers.open_run(DRILL, tmp_path)
    r.folder.mkdir()
    (tmp_path / 'victim').write_text('precious')
    (r.folder / '.00000-00002.safetensors.part').symlink_to(tmp_path / 'victim')
    with pytest.raises(OSError):
        compute(DRILL, tmp_path)
    assert (tmp_path / 'victim').read_text() == 'precious'


# ---- command line -------------------------------------------------------------------------------
def command(*args):
    return subprocess.run(
        [sys.executable, '-c', 'import sys; from rab_nb.cli import main; sys.exit(main())', *map(str, args)],
        capture_output=True,
        text=True,
    )


def test_command_line(tmp_path, capsys):
    wanted, store = tmp_path / 'wanted.json', ['--store', str(tmp_path / 'store')]
    wanted.write_text(json.dumps([DRILL, DRILL | {'random_state': 1}]))
    run = ['run', '--settings', str(wanted), '--jobs', '1', '--quiet', *store]
    assert cli.main(run) == 0
    ids = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert cli.main(['runs', 'list', *store]) == 0
    listing = capsys.readouterr().out
    assert all(i in listing for i in ids) and '7 models' in listing and 'kind=drill' in listing
    folder = tmp_path / 'store' / ids[0]
    (folder / '00003-00005.safetensors').write_bytes(b'')
    (folder / '.00006-00006.safetensors.part').write_bytes(b'left by a dead client')
    assert cli.main(['runs', 'verify', *store]) == 1 and '1 damaged' in capsys.readouterr().out
    with pytest.warns(UserWarning):
        assert cli.main(run) == 0
    assert cli.main(['runs', 'verify', *store, ids[0]]) == 0 and not list(folder.glob('.*'))
    (folder / 'mine.txt').write_text('a file that is not ours')
    assert cli.main(['runs', 'remove', *store, ids[0]]) == 2 and (folder / 'mine.txt').exists()
    assert cli.main(['runs', 'remove', *store, ids[1]]) == 0 and not (tmp_path / 'store' / ids[1]).exists()


def test_rows_and_pairs(tmp_path, capsys):
    "--show prints what --settings takes; rows are the paper's, pairs the profile's."

    def shown(*args):
        assert cli.main(['run', *args, '--show']) == 0
        return json.loads(capsys.readouterr().out)

    chosen = shown('--table', '1', '--rows', '3', '--pairs', '2')
    assert {s['kind'] for s in chosen} == {'dnn', 'undefended'}
    assert (
        all(s['attack']['norm'] == 0.1 and s['data']['classes'] == [8, 6] for s in chosen)
        and chosen[0]['noise'] == 'GaussianNoise(sigma=1.0)'
    )
    (tmp_path / 'chosen.json').write_text(json.dumps(chosen))
    assert shown('--settings', str(tmp_path / 'chosen.json')) == chosen
    assert len(shown('--table', '1', '2')) > len(shown('--table', '1')) >= 24
    everything = [json.dumps(s) for s in shown('--table', '1', '4', '9')]
    assert len(set(everything)) == len(everything)
    for option in ('--rows', '--pairs'):
        assert cli.main(['run', '--table', '1', option, '13']) == 2
        assert f'{option} must be in 1..' in capsys.readouterr().err


def test_outside_of_a_clone(tmp_path, monkeypatch, capsys):
    "Where only the wheel is installed, everything stands in the current folder, and the table is printed."
    monkeypatch.setattr(profiles, 'ROOT', tmp_path / 'site-packages')
    monkeypatch.chdir(tmp_path)
    assert cli.main(['table', '9']) == 2
    assert '`rab-nb run --table 9 --profile quick` computes it' in capsys.readouterr().err
    assert cli.main(['run', '--table', '9', '--rows', '1', '--quiet', '--jobs', '1']) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert '`rab-nb table 9 --profile quick` prints it' in last and 'make' not in last
    assert (tmp_path / 'results/quick/table9.safetensors').is_file()
    assert not (tmp_path / 'site-packages').exists()
    for command in (['table', '9'], ['table', '9', '--profile', 'quick']):
        assert cli.main(command) == 0
        printed = capsys.readouterr().out
        assert printed.startswith('# Table 9') and '**Verdict.**' in printed and '.png' not in printed
        assert printed.count('not run') == 10 # rows 1 and 2 differ in sigma alone and share a run


def test_help_imports_nothing_heavy():
    "`rab-nb --help` answers at once: only the standard library is imported."
    script = (
        'import sys\nfrom rab_nb.cli import main\ntry: main(["run", "--help"])\nexcept SystemExit: pass\n'
        'heavy = {"numpy", "scipy", "torch", "sklearn", "pandas", "yaml", "tqdm"} & set(sys.modules)\n'
        'assert not heavy, heavy'
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0 and '--time-limit' in done.stdout, done.stderr


@pytest.fixture
def own_profile(tmp_path):
    "A profile whose Table 9 is about a file beside it."
    import yaml
    from sklearn.datasets import load_wine

    table = load_wine(as_frame=True).frame.rename(columns=dict(target='label'))
    (tmp_path / 'one').mkdir()
    table.to_csv(tmp_path / 'one/wine.csv', index=False)
    profile = yaml.safe_load((profiles.PROFILES / 'quick.yaml').read_text())
    profile['data']['spambase'] = dict(path='wine.csv', pairs=[[0, 1]])
    path = tmp_path / 'one/mine.yaml'
    path.write_text(yaml.safe_dump(profile))
    return path


def test_a_file_of_ones_own_stands_behind_a_table(own_profile, tmp_path, monkeypatch):
    "From whatever folder it is asked for; the run's name knows the file's name and content, not its place."
    monkeypatch.chdir(tmp_path)
    first = profiles.settings_for(9, own_profile)[0]
    task = experiments.poisoned_task(first).clean
    assert (task.name, task.classes, task.x_train.shape[1], task.stand_in_for) == ('wine', (0, 1), 13, None)
    (own_profile.parent).rename(tmp_path / 'two')
    moved = profiles.settings_for(9, tmp_path / 'two/mine.yaml')[0]
    (
        experiments._task.cache_clear(),
        experiments._poisoned.cache_clear(),
        experiments._cached_knn_environment.cache_clear(),
    )
    again = workers.open_run(moved, tmp_path)
    assert first['data'] != moved['data'] and again.key['data'] == dict(
        name='wine.csv', classes=[0, 1], random_state=0
    )
    text = (tmp_path / 'two/wine.csv').read_text().replace('14.23', '14.24', 1)
    (tmp_path / 'two/wine.csv').write_text(text)
    (
        experiments._task.cache_clear(),
        experiments._poisoned.cache_clear(),
        experiments._cached_knn_environment.cache_clear(),
    )
    assert workers.open_run(moved, tmp_path).id != again.id


@pytest.mark.parametrize(
    'source',
    [
        dict(pairs=[[0, 1]]),
        dict(path='a.csv', name='mnist', pairs=[[0, 1]]),
        dict(path='a.csv'),
        dict(path=3, pairs=[[0, 1]]),
        dict(path='a.csv', pairs=[[0, 1]], label='y'),
    ],
)
def test_a_data_entry_names_one_source(source):
    quick = {key: value for key, value in profiles.load_profile('quick').items() if key != 'profile'}
    with pytest.raises(ValueError, match='data.spambase'):
        profiles.check_profile(quick | dict(data=quick['data'] | dict(spambase=source)), 'mine.yaml')


def test_a_run_in_progress_is_not_removed(tmp_path):
    r = compute(DRILL, tmp_path)
    held = store.claim(r.path(range(3)))
    with pytest.raises(ValueError, match='is being computed right now'):
        store.remove_run(r)
    held.release()
    store.remove_run(r)
    assert not r.folder.exists()


@pytest.mark.parametrize(
    'args,said',
    [
        (['run', '--settings', 'absent.json'], 'absent.json'),
        (['runs', 'remove', 'ffff'], "'ffff'"),
        (['run', '--settings', __file__], 'is not JSON'),
    ],
)
def test_command_line_errors_are_one_line(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('RAB_RUNS', str(tmp_path))
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith('rab-nb: ') and said in error and error.count('\n') == 1


def test_bare_node(tmp_path):
    "On a bare node: none of nbdev, papermill, opacus, dask, pandas, matplotlib."
    script = (
        'import sys\n'
        "heavy = 'nbdev papermill opacus dask distributed matplotlib torchvision fastcore pandas yaml'\n"
        'for m in heavy.split(): sys.modules[m] = None\n'
        "from rab_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / 'wanted.json').write_text(json.dumps([DRILL, TINY]))
    args = [
        'run',
        '--settings',
        tmp_path / 'wanted.json',
        '--store',
        tmp_path,
        '--device',
        'cpu',
        '--jobs',
        1,
    ]
    done = subprocess.run([sys.executable, '-c', script, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0 and '7 of 7 models' in done.stdout and '4 of 4 models' in done.stdout, (
        done.stderr
    )
    assert '100%' in done.stderr
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            script,
            *map(str, args),
            '--scheduler',
            'tcp://127.0.0.1:1',
            '--store',
            str(tmp_path / 'b'),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and 'pip install "rab-nb[cluster]"' in done.stderr


def test_tables_on_a_bare_node(tmp_path):
    "Without nbdev, papermill, opacus, dask, torchvision or matplotlib, rows of a table can be computed."
    script = (
        'import sys\n'
        "heavy = 'nbdev papermill opacus dask distributed matplotlib torchvision fastcore'\n"
        'for m in heavy.split(): sys.modules[m] = None\n'
        "from rab_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    args = [
        'run',
        '--table',
        7,
        '--rows',
        1,
        '--pairs',
        1,
        '--store',
        tmp_path,
        '--statistics',
        tmp_path / 'kept',
        '--jobs',
        1,
        '--device',
        'cpu',
    ]
    done = subprocess.run([sys.executable, '-c', script, *map(str, args)], capture_output=True, text=True)
    assert (
        done.returncode == 0
        and done.stdout.count('1 of 1 models') == 3
        and len(store.read_blocks(tmp_path / 'kept/table7.safetensors')) == 3
    ), done.stderr
