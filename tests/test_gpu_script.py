"scripts/gpu.sh, rehearsed on the CPU with the bundled digits."
import csv
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rab_nb import store

ROOT = Path(__file__).resolve().parent.parent


def script(*args, **environment):
    return subprocess.run([ROOT / 'scripts/gpu.sh', *map(str, args)], capture_output=True, text=True,
                          timeout=900, env=os.environ | {'PYTHON': sys.executable} | environment)


def test_a_rehearsal_on_the_cpu(tmp_path):
    "Every stage ends, within a minute of computing; six small files come out, and the blocks are sound."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = script('--device', 'cpu', '--models', 2, '--out', tmp_path / 'out', '--limit', 600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.count('finished') == 5, done.stdout + done.stderr + (
        tmp_path / 'out/log.txt').read_text()[-3000:]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    files = sorted((tmp_path / 'out').iterdir())
    assert [p.name for p in files] == ['gpu.csv', 'log.txt', 'profile.txt', 'table1.safetensors',
                                       'table2.safetensors', 'table4.safetensors']
    assert all(p.stat().st_size < 10**7 for p in files)
    for table, runs in ((1, 4), (4, 4), (2, 1)):
        blocks = store.read_blocks(tmp_path / f'out/table{table}.safetensors')
        assert [b.n_models for b in blocks if b.key['kind'] == 'dnn'] == [2] * runs
        assert {b.n_models for b in blocks if b.key['kind'] == 'undefended'} == {1}
    measured = list(csv.DictReader((tmp_path / 'out/gpu.csv').open()))
    assert {row['table'] for row in measured if row['what'] == 'training'} == {'1', '4', '2', '5'}
    assert all(float(row['visits_per_second']) > 0 for row in measured if row['what'] == 'training')
    assert {'copy', 'product'} <= {row['what'] for row in measured}


def test_it_stops_before_its_limit(tmp_path):
    """Whatever a stage is doing: with no time for anything, every stage is left out or ended, and the log
    says so."""
    import time
    start = time.monotonic()
    done = script('--device', 'cpu', '--models', 2, '--out', tmp_path / 'out', '--limit', 20)
    assert time.monotonic() - start < 20 and done.returncode == 0
    assert len(done.stdout.splitlines()) == 6 and 'finished' not in done.stdout.splitlines()[-2]


def test_results_are_not_mixed(tmp_path):
    (tmp_path / 'old.txt').write_text('of another run')
    done = script('--device', 'cpu', '--out', tmp_path)
    assert done.returncode == 1 and 'is not empty' in done.stderr


@pytest.mark.parametrize('args', [('--limit', 0), ('--device', 'tpu')])
def test_wrong_arguments(args): assert script(*args).returncode == 2


def test_the_parent_needs_the_standard_library_only():
    import ast
    tree = ast.parse((ROOT / 'scripts/gpu.py').read_text())
    top = {(getattr(n, 'module', None) or n.names[0].name).split('.')[0] for n in tree.body
           if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert top <= set(sys.stdlib_module_names)
