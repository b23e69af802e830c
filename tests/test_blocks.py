"""Blocks of models: full outputs kept in memory as the oracle, any order of merging, processes killed and two
at once, time limits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings as budget, strategies as st

from rab_nb import cli, data, experiments, profiles, report, store, tables, workers
from rab_nb.certificate import certify, certify_statistics
from rab_nb.noise import GaussianNoise

DRILL = dict(kind='drill', n_models=60, shard_size=5, n_points=4)
NOISE = GaussianNoise(1.0)


def outputs(seed, n, points=6, classes=2):
    "float32 probabilities of every temper, certain and tied ones among them."
    rng = np.random.default_rng(seed)
    x = rng.dirichlet(rng.choice([0.05, 0.5, 3.0], classes), (n, points)).astype(np.float32)
    x[rng.random((n, points)) < 0.05] = 1 / classes
    x[:, 0] = np.eye(classes)[rng.integers(classes, size=n)]
    return x


def block(x, numbers, device='cpu', seed=0):
    "A block made of outputs whose row k is model numbers[k]."
    sums, diverged = store.added_up({'test': x}, list(numbers))
    return store.Block(
        dict(kind='toy', seed=seed),
        dict(device=device, torch='2.13.0'),
        store.as_ranges(numbers),
        diverged,
        sums,
        {},
        'toy',
        {},
        dict(milliseconds=7, machines=['here']),
    )


def pieces(x, rng, **where):
    "Blocks of random disjoint sets of models, each inside one thousand, in random order."
    numbers = rng.permutation(len(x))
    cuts = np.sort(rng.choice(np.arange(1, len(x)), min(len(x) - 1, rng.integers(1, 12)), replace=False))
    parts = [
        part[part // store.SPAN == span]
        for part in np.split(numbers, cuts)
        for span in set(part // store.SPAN)
    ]
    made = [
        block(
            x[np.sort(part)], np.sort(part).tolist(), **{k: v[rng.integers(len(v))] for k, v in where.items()}
        )
        for part in parts
    ]
    return [made[i] for i in rng.permutation(len(made))]


# ---- oracles ------------------------------------------------------------------------------------
@given(st.integers(0, 2**32), st.sampled_from([30, 200, 1234]), st.sampled_from([2, 3]))
@budget(deadline=None, max_examples=25)
def test_certificates_from_blocks_never_exceed_those_from_the_outputs(seed, n, classes):
    rng, x = np.random.default_rng(seed), outputs(seed, n, classes=classes)
    stats = store.statistics_of(store.merge_blocks(pieces(x, rng, device=['cpu', 'cuda'])), 'test')
    for bound, votes in (
        ('hoeffding', 'soft'),
        ('empirical_bernstein', 'soft'),
        ('hoeffding', 'hard'),
        ('clopper_pearson', 'hard'),
    ):
        if n < 60 and (bound, votes) != ('clopper_pearson', 'hard'):
            continue
        mine, full = (f(s, NOISE, 0.01, bound, votes) for f, s in ((certify_statistics, stats), (certify, x)))
        assert (
            (mine.p_a <= full.p_a + 1e-15).all()
            and (mine.radius <= full.radius + 1e-12).all()
            and (mine.p_b >= full.p_b - 1e-15).all()
        )
        assert (full.p_a - mine.p_a < 4e-6).all() and np.mean(mine.prediction != full.prediction) < 0.2
    assert (stats.votes == np.stack([(x.argmax(2) == c).sum(0) for c in range(classes)], 1)).all()


@given(st.integers(0, 2**32), st.integers(0, 30))
@budget(deadline=None, max_examples=25)
def test_diverged_models_give_the_worst_answer(seed, lost):
    "The oracle replaces their outputs: all against the predicted class."
    rng, x = np.random.default_rng(seed), outputs(seed, 100)
    gone = rng.choice(100, lost, replace=False)
    x[gone] = np.nan
    stats = store.statistics_of(store.merge_blocks(pieces(x, rng)), 'test')
    assert (stats.n_models, stats.diverged) == (100, lost)
    for bound, votes in (('hoeffding', 'soft'), ('empirical_bernstein', 'soft'), ('clopper_pearson', 'hard')):
        mine = certify_statistics(stats, NOISE, 0.01, bound, votes)
        top = (stats.votes if votes == 'hard' else stats.mean).argmax(1)
        worst = x.copy()
        worst[gone] = 1 - np.eye(2)[top]
        mean = (worst.argmax(2)[..., None] == np.arange(2)).mean(0) if votes == 'hard' else worst.mean(0)
        full = certify(worst, NOISE, 0.01, bound, votes)
        kept = mean.argmax(1) == top
        assert (mine.p_a[kept] <= full.p_a[kept] + 1e-9).all() and (
            np.abs(mine.p_a - full.p_a)[kept] < 4e-6
        ).all()
        assert (mine.prediction[~kept] == -1).all()


def test_an_ensemble_that_diverged_certifies_nothing():
    stats = store.statistics_of([block(np.full((50, 6, 2), np.nan, np.float32), range(50))], 'test')
    assert stats.diverged == 50 and (certify_statistics(stats, NOISE, 0.01).prediction == -1).all()


def test_one_output_that_is_not_finite_is_a_model_that_diverged():
    x = outputs(0, 10)
    x[3, 2, 1] = np.inf
    assert block(x, range(10)).diverged == (3,)


@pytest.mark.parametrize('seed', range(5))
def test_any_order_of_merging_gives_the_same_bytes(seed, tmp_path):
    "At once, one by one, and pairwise; on two kinds of device, over more than a thousand models."
    rng, x = np.random.default_rng(seed), outputs(seed, 1100)
    made = pieces(x, rng, device=['cpu', 'cuda'])

    def tree(blocks):
        if len(blocks) == 1:
            return store.merge_blocks(blocks)
        half = rng.integers(1, len(blocks))
        return store.merge_blocks([*tree(blocks[:half]), *tree(blocks[half:])])

    contents = {store.pack_blocks(f(made)) for f in (store.merge_blocks, tree, lambda b: tree(b[::-1]))}
    for b in made:
        store.add_blocks(tmp_path / 'a', [b])
    for b in made[::-1]:
        store.add_blocks(tmp_path / 'b', [b])
    assert len(contents | {(tmp_path / 'a').read_bytes(), (tmp_path / 'b').read_bytes()}) == 1
    assert len(store.read_blocks(tmp_path / 'a')) <= 4, 'blocks of one origin and one thousand are one'


def test_sums_of_a_thousand_certain_models_fit():
    certain = np.tile(np.float32([[[1, 0], [0, 1]]]), (1000, 1, 1))
    whole = store.merge_blocks([block(certain[:500], range(500)), block(certain[500:], range(500, 1000))])
    assert (store.statistics_of(whole, 'test').mean == [[1, 0], [0, 1]]).all()


def test_equal_blocks_count_once_and_others_that_overlap_are_refused():
    x = outputs(1, 20)
    a, b = block(x[:10], range(10)), block(x[10:], range(10, 20))
    assert store.pack_blocks(store.merge_blocks([a, b, a, b])) == store.pack_blocks(
        store.merge_blocks([a, b])
    )
    for other in (
        block(x[5:15], range(5, 15)),
        block(x[:10], range(10), device='cuda'),
        block(x[10:], range(10)),
        block(x, range(20)),
    ):
        with pytest.raises(store.StatisticsError, match='a model counts once'):
            store.merge_blocks([a, other])
    assert len(store.merge_blocks([a, block(x[:10], range(10), seed=1)])) == 2, (
        'models of other runs are other models'
    )


def test_blocks_about_other_points_are_refused():
    with pytest.raises(store.StatisticsError, match='different points'):
        store.merge_blocks([block(outputs(0, 5), range(5)), block(outputs(0, 5, points=7), range(5, 10))])


# ---- files --------------------------------------------------------------------------------------
def test_what_is_no_file_of_blocks_is_never_overwritten(tmp_path, capsys):
    x = block(outputs(0, 5), range(5))
    whole = store.pack_blocks([x])
    for content in (b'', b'notes of mine', whole[:-1], whole + b' ', whole.replace(b'toy', b'yot', 1)):
        (tmp_path / 'table1.safetensors').write_bytes(content)
        with pytest.raises(store.StatisticsError, match='Restore it'):
            store.add_blocks(tmp_path / 'table1.safetensors', [x])
        assert (
            cli.main(
                [
                    'run',
                    '--table',
                    '1',
                    '--statistics',
                    str(tmp_path),
                    '--store',
                    str(tmp_path / 'store'),
                    '--quiet',
                ]
            )
            == 2
        )
        assert (
            'Restore it' in capsys.readouterr().err
            and (tmp_path / 'table1.safetensors').read_bytes() == content
        )
    assert not (tmp_path / 'store').exists(), 'nothing was computed that could not have been kept'


WRITER = '''
import sys, numpy as np
sys.path.insert(0, sys.argv[3])
from test_blocks import block, outputs
from rab_nb import store
first, step = int(sys.argv[1]), int(sys.argv[4])
x = outputs(0, 400, points=2000)
print(flush=True); sys.stdin.readline()
for k in range(first, 400, step): store.add_blocks(sys.argv[2], [block(x[k:k + 1], range(k, k + 1))])
'''


def writer(path, first=0, step=1):
    w = subprocess.Popen(
        [sys.executable, '-c', WRITER, str(first), path, str(Path(__file__).parent), str(step)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    w.stdout.readline()
    w.stdin.write('go\n')
    w.stdin.flush()
    return w


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path, seen = tmp_path / 'table1.safetensors', 0
    for moment in (0.05, 0.11, 0.23, 0.37):
        w = writer(path)
        time.sleep(moment)
        w.kill()
        w.wait()
        found = store.read_blocks(path)
        numbers = store.numbers_in(found[0].models) if found else []
        assert numbers == list(range(len(numbers))) and len(numbers) >= seen
        seen = len(numbers)
    assert seen > 0
    store.add_blocks(path, [block(outputs(0, 400, points=2000)[399:], [399])])
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != '.lock') == ['table1.safetensors'], (
        'the next writer clears up'
    )


def test_two_writers_at_once_lose_nothing(tmp_path):
    path = tmp_path / 'table1.safetensors'
    for w in [writer(path, i, 40) for i in range(3)]:
        assert w.wait(120) == 0
    assert store.numbers_in(store.read_blocks(path)[0].models) == sorted(
        k for i in range(3) for k in range(i, 400, 40)
    )


# ---- runs that keep blocks ----------------------------------------------------------------------
def compute(settings, place, **how):
    return workers.run_all(
        settings,
        place / 'store',
        **(dict(n_jobs=1, device='cpu', progress=False, statistics=place / 'kept') | how),
    )


@pytest.fixture
def asked(monkeypatch):
    "The shards that were computed."
    said, compute_one = [], workers.compute_shard
    monkeypatch.setattr(
        workers,
        'compute_shard',
        lambda kind, settings, models: (
            said.append((settings.get('random_state', 0), models)) or compute_one(kind, settings, models)
        ),
    )
    return said


def test_kept_models_are_never_computed_again(tmp_path, asked):
    "With the store, without it (a fresh clone), in a larger ensemble, in other portions."
    compute([DRILL], tmp_path)
    first, content = len(asked), (tmp_path / 'kept').read_bytes()
    for place, change in (
        (tmp_path / 'store', {}),
        (tmp_path / 'fresh', {}),
        (tmp_path / 'fresh', {'shard_size': 7}),
    ):
        workers.run_all(
            [DRILL | change], place, 1, device='cpu', progress=False, statistics=tmp_path / 'kept'
        )
    assert len(asked) == first and (tmp_path / 'kept').read_bytes() == content
    workers.run_all(
        [DRILL | dict(n_models=70, shard_size=8)],
        tmp_path / 'fresh',
        1,
        device='cpu',
        progress=False,
        statistics=tmp_path / 'kept',
    )
    assert [models for _, models in asked[first:]] == [range(60, 64), range(64, 70)]
    stats = store.statistics_of(store.read_blocks(tmp_path / 'kept'), 'probabilities')
    exact = workers.drill(DRILL, range(70))['probabilities']
    assert stats.n_models == 70 and (stats.votes[:, 0] == (exact[..., 0] >= 0.5).sum(0)).all()


def test_models_beside_are_not_computed_and_not_written(tmp_path, asked):
    compute([DRILL], tmp_path)
    before = len(asked)
    compute([DRILL | {'n_models': 65}], tmp_path / 'away', beside=[tmp_path / 'kept'])
    assert [models for _, models in asked[before:]] == [range(60, 65)]
    away = store.read_blocks(tmp_path / 'away/kept')
    assert [b.models for b in away] == [((60, 65),)]
    assert cli.main(['merge', str(tmp_path / 'away/kept'), '--into', str(tmp_path / 'kept')]) == 0
    assert [b.models for b in store.read_blocks(tmp_path / 'kept')] == [((0, 65),)]
    assert cli.main(['blocks', str(tmp_path / 'kept')]) == 0


def test_every_run_gets_a_hundred_models_before_any_gets_two(tmp_path, asked):
    wanted = [
        dict(kind='drill', n_models=n, shard_size=50, n_points=2, random_state=i)
        for i, n in enumerate((250, 100, 201))
    ]
    compute(wanted, tmp_path)
    assert [(i, m.start // 100) for i, m in asked] == [
        (0, 0),
        (0, 0),
        (1, 0),
        (1, 0),
        (2, 0),
        (2, 0),
        (0, 1),
        (0, 1),
        (2, 1),
        (2, 1),
        (0, 2),
        (2, 2),
    ]


def test_a_hundred_models_are_kept_as_soon_as_they_are_there(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        workers,
        'keep_blocks',
        lambda path, some, keep=workers.keep_blocks: kept.append(sum(b.n_models for b in keep(path, some))),
    )
    compute([dict(kind='drill', n_models=250, shard_size=50)], tmp_path)
    assert kept == [100, 200, 250, 250]


def test_time_limit(tmp_path):
    """The process ends in time, what was finished is kept, all runs alike; a busy machine gets the time
    that its start takes."""
    start = time.monotonic()
    subprocess.run([sys.executable, '-c', 'import rab_nb.workers'], check=True)
    limit = 12 + 4 * (time.monotonic() - start)
    (tmp_path / 'main.py').write_text(
        'import sys; from rab_nb import cli, experiments, workers\n'
        'drill = dict(kind="drill", n_models=900, shard_size=5, n_points=4, seconds=.3)\n'
        'some = [dict(drill, random_state=i) for i in range(2)]\n'
        'how = dict(device="cpu", progress=False, statistics=sys.argv[2])\n'
        'if __name__ == "__main__":\n'
        '    workers.run_all(some, sys.argv[1], 1, until=cli._until(float(sys.argv[3])), **how)'
    )
    start = time.monotonic()
    subprocess.run(
        [sys.executable, tmp_path / 'main.py', tmp_path / 'store', tmp_path / 'kept', str(limit)], check=True
    )
    assert time.monotonic() - start < limit
    counts = [
        sum(b.n_models for b in store.read_blocks(tmp_path / 'kept') if b.key['random_state'] == i)
        for i in range(2)
    ]
    assert (
        0 < counts[0] < 900
        and 0 <= counts[0] - counts[1] <= 100
        and not list(tmp_path.rglob('store/*/.*.part'))
    )


def test_no_shard_starts_that_would_not_end_in_time(tmp_path, asked):
    "The first shard tells the pace; the second would end after the deadline."
    one = DRILL | {'seconds': 1.5}
    out = workers.run_all(
        [one],
        tmp_path / 'store',
        1,
        device='cpu',
        progress=False,
        statistics=tmp_path / 'kept',
        until=time.monotonic() - 1,
    )
    assert asked == [] and store.read_blocks(tmp_path / 'kept') == [] and len(out[0].missing()) == 12
    deadline = workers.Deadline(time.monotonic() + 3)
    deadline.note(workers.Job(out[0], range(5)), 1.5)
    assert deadline.allows(out[0], range(5)) and not deadline.allows(out[0], range(10))


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stopped_runs_keep_what_they_have(number, tmp_path):
    script = 'import sys; from rab_nb import cli\nif __name__ == "__main__": sys.exit(cli.main(sys.argv[1:]))'
    (tmp_path / 'main.py').write_text(script)
    command = [
        sys.executable,
        tmp_path / 'main.py',
        'run',
        '--table',
        '1',
        '--profile',
        profiles.PROFILES / 'quick.yaml',
        '--rows',
        '1',
        '--pairs',
        '1',
        '--jobs',
        '1',
        '--device',
        'cpu',
        '--quiet',
        '--statistics',
        tmp_path / 'kept',
        '--store',
        tmp_path / 'store',
    ]
    run = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not list(tmp_path.glob('store/*/0*.safetensors')) and time.monotonic() < end:
        time.sleep(0.02)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and 'stopped' in errors and 'Traceback' not in errors, errors
    found = store.read_blocks(tmp_path / 'kept/table1.safetensors')
    assert 0 < sum(b.n_models for b in found if b.key['kind'] == 'dnn') < 100


# ---- tables -------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def some_rows(tmp_path_factory):
    "Table 1's first two rows, one pair, with 50 and 25 of 100 models."
    place, profile = tmp_path_factory.mktemp('rows'), profiles.load_profile('quick')
    profile['ensemble']['mnist'] |= dict(epochs=2, shard_size=25)
    profile['data']['mnist']['pairs'] = [[0, 1]]
    rows = profiles.rows_of(profiles.spec(1), profile)[:2]
    for row, n in zip(rows, (50, 25)):
        compute(list(profiles.runs_of(row, profile, n).values()), place)
    return profile, place / 'kept'


def test_rows_with_different_numbers_of_models(some_rows, tmp_path):
    profile, kept = some_rows
    found = tables.finished_rows(profiles.spec(1), profile, statistics=kept)
    assert [(f.n_models, f.n_asked) for f in found] == [(50, 100), (25, 100)]
    report.write_table(found, profiles.spec(1), profile, tmp_path)
    page, text = json.loads((tmp_path / 'table1.json').read_text()), (tmp_path / 'table1.md').read_text()
    assert page['provisional'] and page['models'] == dict(fewest=25, most=50, asked=100)
    assert (
        'provisional, 25 to 50 of N = 100 models' in page['caption']
        and 'rab-nb run --table 1 --profile quick' in text
    )
    models = page['columns'].index('N')
    assert [line[models] for line in page['lines'] if line[0]][:3] == ['50', '25', '']


def test_tables_need_blocks_and_nothing_else(some_rows, tmp_path, monkeypatch):
    "Neither data nor the store of the machine that computed them."
    profile, kept = some_rows
    before = tables.finished_rows(profiles.spec(1), profile, statistics=kept)
    monkeypatch.setenv('RAB_RUNS', str(tmp_path / 'empty'))
    monkeypatch.setattr(data, 'load', lambda *a, **k: pytest.fail('a table asked for data'))
    experiments._task.cache_clear()
    experiments._poisoned.cache_clear()
    again = tables.finished_rows(profiles.spec(1), profile, statistics=kept)
    assert tables.tidy(again, profiles.spec(1)).equals(tables.tidy(before, profiles.spec(1)))


def test_a_complete_table_is_drawn_without_data_and_without_computing(some_rows, tmp_path, monkeypatch):
    "`finish` computes what is missing, and of these rows nothing is."
    profile, kept = some_rows
    profile = dict(profile, ensemble=dict(mnist=profile['ensemble']['mnist'] | dict(n_models=25)))
    monkeypatch.setenv('RAB_RUNS', str(tmp_path / 'empty'))
    monkeypatch.setattr(data, 'load', lambda *a, **k: pytest.fail('a table asked for data'))
    experiments._task.cache_clear()
    experiments._poisoned.cache_clear()
    found = tables.finish(profiles.spec(1), profile, first=2, statistics=kept)
    assert [(f.n_models, f.n_asked) for f in found] == [(50, 25), (25, 25)] and not (
        tmp_path / 'empty'
    ).exists()


def test_models_of_another_engine_or_precision_stay_out(some_rows, tmp_path):
    profile, kept = some_rows
    settings = profiles.runs_of(profiles.rows_of(profiles.spec(1), profile)[0], profile)['smoothed']
    blocks = store.read_blocks(kept)
    mine = tables.blocks_behind(settings, blocks)
    assert sum(b.n_models for b in mine) == 50

    def other(**change):
        from dataclasses import replace

        return [replace(b, key=b.key | {'environment': b.key['environment'] | change}) for b in mine]

    assert tables.blocks_behind(settings, other(engine=2)) == []
    half = [b for b in other(precision='bf16')]
    assert tables.blocks_behind(settings, [*mine, *half])[0].key['environment']['precision'] in (
        'float32',
        'bf16',
    )
    assert (
        len({b.key['environment']['precision'] for b in tables.blocks_behind(settings, [*mine, *half])}) == 1
    )
    with pytest.raises(store.StatisticsError, match='different data'):
        tables.blocks_behind(settings, [*mine, *other(data='0' * 64)])


def test_a_table_that_was_not_run_says_how_to_run_it(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'ROOT', tmp_path)
    (tmp_path / 'results/cpu').mkdir(parents=True)
    (tmp_path / 'results/cpu/table2.csv').write_text('of an older version')
    page = report.make_table(2, 'cpu', compute=False)
    assert (
        page.name == 'table2.md'
        and '`rab-nb run --table 2 --profile cpu` computes it' in page.read_text()
        and 'not run' in page.read_text()
    )
    assert sorted(p.name for p in page.parent.iterdir()) == ['table2.json', 'table2.md']
    text = report.write_list(tmp_path / 'results').read_text()
    assert '| 2: DNN-RAB on CIFAR-10 | not run |' in text and 'rab-nb run --table 1' in text


def test_exact_tables_are_kept_once():
    assert [profiles.home_profile(t, 'cpu') for t in (1, 7, 8, 9)] == ['cpu', 'paper', 'paper', 'paper']
    assert profiles.home_profile(9, 'quick') == 'quick' and profiles.home_profile(9, 'paper') == 'paper'
