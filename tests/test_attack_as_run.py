"The attack as it was run: what the committed table promises, that its page follows, and that a run goes on."
import pandas as pd
import pytest

from rab_nb import profiles, report

RESULTS = profiles.ROOT / 'results'
NOTEBOOK = profiles.ROOT / 'nbs/experiments/labels.ipynb'
TABLE = pd.read_csv(RESULTS / 'attack_as_run.csv')
MEASURED = ['held_out', 'relabelled', 'accuracy', 'marks', 'labels', 'test_input']


def cell(v):
    if v != v: return '-'
    return f'{v:.4g}' if isinstance(v, float) else str(v)


def test_every_strength_asks_for_more():
    shares = TABLE[['accuracy', 'marks', 'labels', 'test_input']]
    assert (shares.fillna(0) >= 0).all(axis=None) and (shares.fillna(0) <= 1).all(axis=None)
    assert (shares.accuracy >= shares.marks).all() and (shares.marks >= shares.labels).all()
    assert (shares.labels >= shares.test_input.fillna(0)).all()
    assert (shares.test_input.isna() == (TABLE.test_sigma == 0)).all()


def test_one_choice_of_noise_for_all_seeds_and_learners():
    case = ['n_models', 'data', 'target', 'other', 'rate', 'norm', 'chosen_by', 'chosen_for']
    assert (TABLE.groupby(case)[['sigma', 'flip', 'test_sigma', 'held_out']].nunique() == 1).all(axis=None)
    assert not TABLE.duplicated([*case, 'learner', 'seed']).any()


@pytest.mark.parametrize('target, rate, column, least', [
    ('0', .001, 'test_input', .99), ('0', .005, 'test_input', .99), ('0', .02, 'test_input', .9),
    ('8', .001, 'test_input', .88), ('8', .005, 'test_input', .84), ('8', .02, 'test_input', .15),
    ('8', .02, 'labels', .4)])
def test_mnist_is_certified_as_far_as_it_should(target, rate, column, least):
    rows = TABLE.query("data == 'mnist' and norm == .1 and n_models == 1000 and rate == @rate")
    rows = rows[(rows.target.astype(str) == target) & (rows.chosen_for == column)]
    shares = rows.groupby('learner')[column].mean()
    assert shares.max() >= least


def test_five_seeds_where_a_mean_is_promised():
    rows = TABLE.query("data == 'mnist' and norm == .1 and rate == .02 and learner == 'centroid'")
    assert set(rows[rows.target.astype(str) == '0'].seed) == {0, 1, 2, 3, 4}


def test_the_page_follows_from_the_table():
    lines = (RESULTS / 'attack_as_run.md').read_text().splitlines()
    lines = [[c.strip() for c in line.strip('|').split('|')] for line in lines if line.startswith('| ')]
    page = pd.DataFrame(lines[2:], columns=lines[0])
    groups = [c for c in page if c not in (*MEASURED, 'seeds')]
    by = TABLE.groupby(groups, sort=False)
    means = by[MEASURED].mean().assign(seeds=by.size()).reset_index()
    assert page.values.tolist() == [[cell(v) for v in row] for row in means.itertuples(index=False)]


def test_a_run_writes_its_files_and_goes_on(tmp_path):
    def run(): report.run_notebook(NOTEBOOK, tmp_path / 'out.ipynb', results=str(tmp_path / 'toy'))
    run()
    written = {path.name: path.read_bytes() for path in tmp_path.glob('toy*')}
    assert set(written) == {'toy.csv', 'toy.md', 'toy.png', 'toy_votes.csv'}
    rows = pd.read_csv(tmp_path / 'toy.csv')
    assert len(rows) == 2 and rows.test_input.between(.5, 1).all()
    rows.assign(accuracy=[1., .9876]).iloc[1:].to_csv(tmp_path / 'toy.csv', index=False)
    run()
    again = pd.read_csv(tmp_path / 'toy.csv').sort_values('rate', ignore_index=True)
    assert again.accuracy[1] == .9876 and again.drop(columns='accuracy').equals(rows.drop(columns='accuracy'))
