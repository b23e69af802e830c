"The experiment notebooks run through papermill, at tiny size, into a temporary folder; and papermill's leniency is gone."
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rab_nb import report, runs, tables

EXPERIMENTS = tables.ROOT / 'nbs/experiments'


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv('RAB_RUNS', str(tmp_path / 'runs'))


@pytest.mark.parametrize('notebook, table, options', [
    ('dnn', 1, {'n_estimators': 50, 'rows': 1}), ('dnn', 4, {'n_estimators': 25, 'rows': 1}), ('knn', 9, {'rows': 2})])
def test_tiny_run_writes_every_file(notebook, table, options, tmp_path):
    out = report.run_notebook(EXPERIMENTS / f'{notebook}.ipynb', tmp_path / f'table{table}.ipynb', table=table, profile='quick', folder=str(tmp_path), **options)
    assert {path.suffix for path in tmp_path.glob(f'table{table}.*')} == {'.csv', '.json', '.md', '.tex', '.png', '.ipynb'}
    scores = pd.read_csv(tmp_path / f'table{table}.csv')
    accuracy = scores[scores.metric.isin(['prediction_accuracy', 'certified_accuracy', 'certified_rate'])]
    assert accuracy.value.between(0, 1).all() and len(accuracy) > 10
    assert 'not run' in (tmp_path / f'table{table}.md').read_text()
    assert not [output for cell in json.loads(out.read_text())['cells'] for output in cell.get('outputs', []) if output['output_type'] == 'error']


def test_second_execution_is_byte_identical(tmp_path):
    for folder in ('a', 'b'):
        report.run_notebook(EXPERIMENTS / 'dnn.ipynb', tmp_path / folder / 'table1.ipynb', table=1, profile='quick', folder=str(tmp_path / folder), n_estimators=50, rows=1)
    assert (tmp_path / 'a/table1.csv').read_bytes() == (tmp_path / 'b/table1.csv').read_bytes()


def test_lost_parameters_tag_stops_the_run(tmp_path):
    notebook = json.loads((EXPERIMENTS / 'dnn.ipynb').read_text())
    for cell in notebook['cells']: cell['metadata'].pop('tags', None)
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
    good, random = (tables.PROFILES / 'quick.yaml').read_bytes(), np.random.default_rng(0)
    for i in range(500):
        text = bytearray(good)
        for _ in range(random.integers(1, 6)): text[random.integers(len(text))] = random.integers(256)
        (tmp_path / 'fuzzed.yaml').write_bytes(bytes(text[:random.integers(1, len(text) + 1)]))
        try: profile = tables.load_profile(tmp_path / 'fuzzed.yaml')
        except ValueError: continue
        assert set(tables.REQUIRED) < set(profile)


def test_a_profile_cannot_run_code(tmp_path):
    (tmp_path / 'evil.yaml').write_text(f"seeds: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ValueError): tables.load_profile(tmp_path / 'evil.yaml')
    assert not (tmp_path / 'made').exists()


@pytest.mark.parametrize('path', sorted((tables.ROOT / 'results').glob('*/table?.json')), ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_committed_pages_agree_with_their_numbers(path):
    page, scores = json.loads(path.read_text()), pd.read_csv(path.with_suffix('.csv'))
    table = tables.spec(page['number'])
    assert page['lines'] == report.lines_of(scores, table, tables.statements(table)[0])
    assert page['verdict'] == report.verdict(scores, table)
    assert path.with_suffix('.md').read_text() == report.page_markdown(page)
    for caption in ('Profile', 'Data:', 'seeds', 'alpha', 'Code'): assert caption in page['caption']


def test_a_committed_summary_under_another_name_is_refused(tmp_path):
    profile = tables.load_profile('cpu')
    a, b = (tables.ensemble_runs(r, profile)['smoothed'] for r in tables.rows_of(tables.spec(1), profile)[:3:2])
    name = lambda settings: f'{runs.experiment_id(settings)[:16]}.safetensors'
    source = tables.ROOT / 'results/cpu/runs' / name(b)
    shutil.copy(source, tmp_path / name(b))
    assert tables.summary_of(b, tmp_path).settings['noise'] == b['noise']
    shutil.move(tmp_path / name(b), tmp_path / name(a))
    with pytest.raises(runs.ShardError, match='holds another run'): tables.summary_of(a, tmp_path)
