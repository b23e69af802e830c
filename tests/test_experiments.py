"""The experiment notebooks run through papermill, at tiny size, into a temporary folder; and papermill's
leniency is gone."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from rab_nb import profiles, report, store as blocks, tables, workers

EXPERIMENTS = profiles.ROOT / 'nbs/experiments'


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv('RAB_RUNS', str(tmp_path / 'runs'))


@pytest.mark.parametrize(
    'notebook, table, options',
    [
        ('dnn', 1, {'n_estimators': 50, 'rows': 1}),
        ('dnn', 4, {'n_estimators': 25, 'rows': 1}),
        ('knn', 9, {'rows': 2}),
    ],
)
def test_tiny_run_writes_every_file(notebook, table, options, tmp_path):
    out = report.run_notebook(
        EXPERIMENTS / f'{notebook}.ipynb',
        tmp_path / f'table{table}.ipynb',
        table=table,
        profile='quick',
        folder=str(tmp_path),
        **options,
    )
    assert {path.suffix for path in tmp_path.glob(f'table{table}.*')} == {
        '.csv',
        '.json',
        '.md',
        '.tex',
        '.png',
        '.ipynb',
    }
    scores = pd.read_csv(tmp_path / f'table{table}.csv')
    accuracy = scores[scores.metric.isin(['prediction_accuracy', 'certified_accuracy', 'certified_rate'])]
    assert accuracy.value.between(0, 1).all() and len(accuracy) > 10
    assert 'not run' in (tmp_path / f'table{table}.md').read_text()
    assert not [
        output
        for cell in json.loads(out.read_text())['cells']
        for output in cell.get('outputs', [])
        if output['output_type'] == 'error'
    ]


def test_second_execution_is_byte_identical(tmp_path):
    def written():
        report.run_notebook(
            EXPERIMENTS / 'dnn.ipynb',
            tmp_path / 'table1.ipynb',
            table=1,
            profile='quick',
            folder=str(tmp_path),
            n_estimators=50,
            rows=1,
        )
        return {path.name: path.read_bytes() for path in tmp_path.glob('table1.*')}

    assert written() == written()


def test_lost_parameters_tag_stops_the_run(tmp_path):
    notebook = json.loads((EXPERIMENTS / 'dnn.ipynb').read_text())
    for cell in notebook['cells']:
        cell['metadata'].pop('tags', None)
    (tmp_path / 'dnn.ipynb').write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match="tagged 'parameters'"):
        report.run_notebook(tmp_path / 'dnn.ipynb', tmp_path / 'out.ipynb', table=1)
    assert not (tmp_path / 'out.ipynb').exists()


def test_unknown_parameter_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match='n_estimator'):
        report.run_notebook(EXPERIMENTS / 'dnn.ipynb', tmp_path / 'out.ipynb', n_estimator=3)


def test_a_failing_notebook_leaves_the_old_result(tmp_path):
    out = tmp_path / 'table1.ipynb'
    out.write_text('the old one')
    with pytest.raises(Exception, match='bogus'):
        report.run_notebook(EXPERIMENTS / 'dnn.ipynb', out, profile='bogus')
    assert out.read_text() == 'the old one' and not list(tmp_path.glob('*.part*'))


def test_profiles_of_arbitrary_bytes_give_clean_errors(tmp_path):
    good, random = (profiles.PROFILES / 'quick.yaml').read_bytes(), np.random.default_rng(0)
    for _ in range(500):
        text = bytearray(good)
        for _ in range(random.integers(1, 6)):
            text[random.integers(len(text))] = random.integers(256)
        (tmp_path / 'fuzzed.yaml').write_bytes(bytes(text[: random.integers(1, len(text) + 1)]))
        try:
            profile = profiles.load_profile(tmp_path / 'fuzzed.yaml')
        except ValueError:
            continue
        assert set(profiles.REQUIRED) < set(profile)
        for table in (1, 4, 9):
            try:
                [workers.open_run(s) for s in profiles.settings_for(table, tmp_path / 'fuzzed.yaml')[:2]]
            except ValueError:
                pass


@pytest.mark.parametrize(
    'part, change',
    [
        ('knn', {}),
        ('ensemble', {'mnist': None}),
        ('ensemble', {'mnist': {'epochs': 1}}),
        ('dp', {'mnist': {'max_grad_norms': 5.0, 'noise_multiplier': 4.0}}),
        ('data', {'mnist': {'name': 'digits', 'pairs': []}}),
        ('data', {'mnist': {'name': 'digits', 'pairs': [[[0], 1]]}}),
        ('ensemble', {'mnst': {}}),
    ],
)
def test_a_profile_says_what_is_wrong_before_anything_runs(part, change):
    quick = {key: value for key, value in profiles.load_profile('quick').items() if key != 'profile'}
    with pytest.raises(ValueError, match=part):
        profiles.check_profile(quick | {part: change}, 'mine.yaml')


def test_a_relative_profile_makes_a_table_and_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, 'ROOT', tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copy(profiles.PROFILES / 'quick.yaml', 'mine.yaml')
    asked = {}
    monkeypatch.setattr(report, 'finish', lambda *args: [])
    monkeypatch.setattr(report, 'run_notebook', lambda notebook, out, **parameters: asked.update(parameters))
    assert (
        report.main(['make', '1', 'mine.yaml']) == 0
        and asked['profile'] == str(tmp_path / 'mine.yaml')
        and asked['folder'] == 'results/mine'
    )
    assert (
        report.main(['where', 'mine.yaml', '1']) == 2
        and 'results/mine/table1.json is not there' in capsys.readouterr().err
    )


def test_stopped_and_failed_commands_say_so_in_a_line(monkeypatch, capsys):
    for error, code in (
        (KeyboardInterrupt(), 130),
        (RuntimeError('shard 3 failed'), 2),
        (OSError('disk full'), 2),
    ):

        def broken(*args, error=error):
            raise error

        monkeypatch.setattr(report, 'make_table', broken)
        assert report.main(['make', '1', 'quick']) == code and capsys.readouterr().err.count('\n') == 1


def test_a_profile_cannot_run_code(tmp_path):
    (tmp_path / 'evil.yaml').write_text(f"seeds: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ValueError):
        profiles.load_profile(tmp_path / 'evil.yaml')
    assert not (tmp_path / 'made').exists()


COMMITTED = [
    path
    for profile in profiles.SHARED
    for path in sorted((profiles.ROOT / 'results' / profile).glob('table?.json'))
]


@pytest.mark.parametrize('path', COMMITTED, ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_committed_pages_agree_with_their_numbers(path):
    page = json.loads(path.read_text())
    table, profile = profiles.spec(page['number']), profiles.load_profile(page['profile'])
    assert path.with_suffix('.md').read_text() == report.page_markdown(page)
    if 'cost' not in page:
        assert (
            page == json.loads(json.dumps(report.missing_page(table, profile)))
            and not path.with_suffix('.csv').exists()
        )
        return
    scores = pd.read_csv(path.with_suffix('.csv'))
    assert page['lines'] == report.lines_of(scores, table, tables.statements(table)[0])
    assert page['verdict'] == report.verdict(scores, table)
    asked = {
        ' / '.join(map(str, pair))
        for pair in profiles.load_profile(page['profile'])['data'][table.dataset]['pairs']
    }
    assert set(page['not_run']) == asked - set(scores.pair)
    for caption in ('Profile', 'Data:', 'seeds', 'alpha'):
        assert caption in page['caption']
    assert (
        set(json.loads(path.with_suffix('.provenance.json').read_text())) == {'commit', 'versions'}
        and page['models']['asked'] == scores.n_models.max()
        or page['provisional']
    )


def test_the_list_of_results_is_that_of_its_pages():
    assert (profiles.ROOT / 'results/README.md').read_text() == report.list_of_tables(
        report.all_pages(profiles.ROOT / 'results')
    )


@pytest.mark.parametrize(
    'path',
    [p for p in COMMITTED if p.with_suffix('.safetensors').exists()],
    ids=lambda path: f'{path.parent.name}-{path.stem}',
)
def test_committed_numbers_are_those_of_their_blocks(path):
    "The scores of every row, computed again from the file of blocks."
    page = json.loads(path.read_text())
    table, profile = profiles.spec(page['number']), profiles.load_profile(page['profile'])
    found = tables.finished_rows(table, profile, statistics=path.with_suffix('.safetensors'))
    text = tables.beside_paper(tables.with_means(tables.tidy(found, table)), table).to_csv(
        index=False, float_format='%.6g', lineterminator='\n'
    )
    assert text == path.with_suffix('.csv').read_text()


def test_blocks_of_another_run_do_not_become_a_row(tmp_path):
    "Settings are compared whole, not by the title that readers see."
    profile = profiles.load_profile('quick')
    profile['ensemble']['mnist'] |= dict(epochs=1, n_models=25, shard_size=25)
    profile['data']['mnist']['pairs'] = [[0, 1]]
    row = profiles.rows_of(profiles.spec(1), profile)[0]
    workers.run_all(
        list(profiles.runs_of(row, profile).values()),
        n_jobs=1,
        device='cpu',
        progress=False,
        statistics=tmp_path / 'kept',
    )
    assert len(tables.finished_rows(profiles.spec(1), profile, first=1, statistics=tmp_path / 'kept')) == 1
    for change in (
        dict(epochs=2),
        dict(batch_size=16),
        dict(module=dict(name='digits_cnn', size=24, width=8)),
        dict(test_noise='none'),
    ):
        other = dict(profile, ensemble=dict(mnist=profile['ensemble']['mnist'] | change))
        assert tables.finished_rows(profiles.spec(1), other, first=1, statistics=tmp_path / 'kept') == []
    assert all(
        b.title == 'one_pixel 1.0 0.1 sigma 1.0 | 0/1 | seed 0'
        for b in blocks.read_blocks(tmp_path / 'kept')
        if b.key['kind'] == 'dnn'
    )


def tracked():
    import subprocess

    done = subprocess.run(['git', 'ls-files', '-z'], cwd=profiles.ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip('not a git checkout')
    return [profiles.ROOT / name for name in done.stdout.split('\0') if name]


def test_the_tree_is_light():
    "A clone, with a data set, fits onto a bare node."
    size = sum(path.stat().st_size for path in tracked() if path.is_file())
    assert size < 20 * 2**20, f'{size / 2**20:.1f} MiB are tracked'
    assert not [path for path in tracked() if 'quick' in path.parts and 'results' in path.parts]
