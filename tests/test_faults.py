"""Faults that happen for real: processes killed, files damaged, disks full. `make test-faults` prints each
fault and its outcome."""

import contextlib
import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

psutil = pytest.importorskip('psutil')
import test_runs  # noqa: E402

from rab_nb import cli, experiments, store, workers  # noqa: E402, F401 (experiments registers the kinds of runs)

pytestmark = pytest.mark.faults
BIN = Path(sys.executable).parent
SETTINGS = dict(kind='drill', n_models=24, shard_size=2, n_points=16, seconds=0.3)
TINY = test_runs.TINY | dict(n_models=8, train=test_runs.TINY['train'] | dict(epochs=20))
seeds = itertools.count()


@pytest.fixture
def outcome(request, record_property):
    "Note the fault (the test's documentation) and what became of it; tests/conftest.py prints both."

    def say(text):
        record_property('fault', request.function.__doc__)
        record_property('outcome', text)

    return say


@pytest.fixture
def settings():
    return SETTINGS | {'random_state': next(seeds)}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Arrays of the same run without any fault, in another store and without the pauses."
    cache = {}

    def arrays(settings):
        key = store.canonical(settings)
        if key not in cache:
            cache[key] = workers.run(
                settings, tmp_path_factory.mktemp('undisturbed'), n_jobs=1, device='cpu', progress=False
            )
        return {name: cache[key].arrays(name) for name in cache[key].read(cache[key].shards[0])[0]}

    return lambda settings: arrays(settings | {'seconds': 0} if settings['kind'] == 'drill' else settings)


def complete(settings, store, undisturbed, **how):
    "Run (again) and compare every array with the undisturbed run."
    r = workers.run(settings, store, device='cpu', progress=False, **({'n_jobs': 1} | how))
    for name, expected in undisturbed(settings).items():
        np.testing.assert_array_equal(r.arrays(name), expected)
    assert r.missing() == []
    assert sorted(p.name for p in r.folder.iterdir()) == sorted(
        [r.path(s).name for s in r.shards] + ['settings.json']
    )
    return r


def client(settings, store, *options):
    "`rab-nb run` in a process group of its own."
    file = Path(store) / 'wanted.json'
    file.write_text(json.dumps(settings))
    return subprocess.Popen(
        [
            BIN / 'rab-nb',
            'run',
            '--settings',
            file,
            '--store',
            store,
            '--device',
            'cpu',
            '--quiet',
            *map(str, options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(condition, what, seconds=240):
    "Wait for a condition and return its value."
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f'waited {seconds} s for {what}'
        time.sleep(0.02)
    return value


def written(settings, store):
    return {
        p.name: p.stat().st_ino
        for p in workers.open_run(settings, store, 'cpu').folder.glob('0*.safetensors')
    }


def worker_processes(process):
    "The worker processes of a client (its helper that tracks resources is none)."
    with contextlib.suppress(psutil.NoSuchProcess):
        return [
            p
            for p in psutil.Process(process.pid).children(recursive=True)
            if 'popen_loky' in ' '.join(p.cmdline())
        ]
    return []


def gone(processes):
    return lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


# ---- local workers ------------------------------------------------------------------------------
def test_worker_killed(settings, tmp_path, undisturbed, outcome):
    "kill -9 of a local worker in mid-shard, twice"
    run = client(settings, tmp_path, '--jobs', 2)
    for n in (1, 4):
        until(
            lambda: len(written(settings, tmp_path)) >= n and len(worker_processes(run)) == 2,
            'a finished shard',
        )
        worker_processes(run)[0].kill()
    _, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    complete(settings, tmp_path, undisturbed)
    outcome('the run went on with new workers, result identical')


def test_shard_that_kills_its_worker(tmp_path, outcome):
    "a shard that ends every worker that tries it"
    script = (
        'import os, sys; sys.path.insert(0, sys.argv[2])\nfrom rab_nb import workers; import deadly\n'
        'if __name__ == "__main__":\n'
        '    workers.register("deadly", deadly.shard)\n'
        '    settings = dict(kind="deadly", n_models=3, shard_size=1)\n'
        '    workers.run(settings, sys.argv[1], n_jobs=2, progress=False)'
    )
    (tmp_path / 'deadly.py').write_text(
        'import os, numpy as np\n'
        'def shard(settings, models):\n'
        '    if models.start == 1: os.kill(os.getpid(), 9)\n'
        '    return {"a": np.zeros(1)}\n'
    )
    (tmp_path / 'main.py').write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / 'main.py', tmp_path, tmp_path],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1 and 'shard 1-1 of run' in done.stderr and 'exit code -9' in done.stderr, (
        done.stderr
    )
    assert not list(tmp_path.rglob('.*.part'))
    outcome('the run gives up after three attempts: ' + done.stderr.strip().splitlines()[-1][:110])


@pytest.mark.parametrize('settings', [SETTINGS | {'random_state': 1000}, TINY], ids=['drill', 'dnn'])
def test_client_killed(settings, tmp_path, undisturbed, outcome):
    "kill -9 of the client"
    run = client(settings, tmp_path, '--jobs', 2)
    until(lambda: len(written(settings, tmp_path)) >= 1, 'a finished shard')
    orphans = worker_processes(run)
    run.kill()
    run.wait()
    until(gone(orphans), 'the workers to end')
    before = written(settings, tmp_path)
    again = client(settings, tmp_path, '--jobs', 2)
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert before.items() <= written(settings, tmp_path).items(), 'a finished shard was computed again'
    r = complete(settings, tmp_path, undisturbed)
    outcome(
        f'no orphans; {len(before)} of {len(r.shards)} shards were finished and not computed again, '
        'result identical'
    )


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['SIGINT', 'SIGTERM'])
def test_stop_request(settings, number, tmp_path, undisturbed, outcome):
    "SIGINT (Ctrl-C, to the whole group) or SIGTERM (batch system) during a run"
    settings |= {'n_models': 60}
    run = client(settings, tmp_path, '--jobs', 2)
    until(lambda: len(written(settings, tmp_path)) >= 3, 'finished shards')
    orphans = worker_processes(run)
    os.killpg(run.pid, number) if number == signal.SIGINT else run.terminate()
    _, errors = run.communicate(timeout=240)
    assert (
        run.returncode == 130 and 'stopped; finished shards are safe' in errors and 'Traceback' not in errors
    ), errors
    until(gone(orphans), 'the workers to end')
    before = written(settings, tmp_path)
    assert not list(tmp_path.rglob('.*.part'))
    complete(settings, tmp_path, undisturbed)
    assert before.items() <= written(settings, tmp_path).items()
    outcome(
        f'{number.name}: exit status 130, one line, no orphans or temporary files; {len(before)} finished '
        'shards kept, result identical'
    )


# ---- Dask ---------------------------------------------------------------------------------------
class Cluster:
    "A real `dask scheduler` and `dask worker` processes on loopback."

    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.folder, self.address = folder, f'tcp://127.0.0.1:{self.port}'
        self.scheduler, self.workers = (
            self.start('scheduler', '--host', '127.0.0.1', '--port', self.port, '--no-dashboard'),
            [],
        )

    def start(self, *command):
        log = open(self.folder / f'{command[0]}.log', 'a')
        environment = os.environ | {'DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT': '60'}
        return subprocess.Popen(
            [BIN / 'dask', *map(str, command)],
            stdout=log,
            stderr=log,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
        )

    def add_worker(self, *options):
        self.workers.append(
            self.start('worker', self.address, '--nthreads', 1, '--no-dashboard', '--no-nanny', *options)
        )

    def stop(self):
        for p in [self.scheduler, *self.workers]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)
            p.wait()


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    pytest.importorskip('distributed')
    c = Cluster(tmp_path_factory.mktemp('cluster'))
    c.add_worker()
    c.add_worker()
    yield c
    c.stop()


@pytest.mark.parametrize(
    'settings', [SETTINGS | {'random_state': 1001, 'seconds': 0}, TINY], ids=['drill', 'dnn']
)
def test_dask_equals_local(settings, cluster, tmp_path, undisturbed, outcome):
    "none: the same run on Dask and in local workers"
    complete(settings, tmp_path / 'dask', undisturbed, scheduler=cluster.address)
    complete(settings, tmp_path / 'local', undisturbed, n_jobs=2)
    outcome('bit-identical to each other and to a run in one process')


def table1(store, monkeypatch, **how):
    "Table 1 of the profile quick (50 models of 2 epochs) from a store, as the text of its csv file."
    from rab_nb import profiles, tables

    profile = profiles.load_profile('quick') | dict(seeds=[0])
    profile['ensemble']['mnist'] |= dict(epochs=2, n_models=50, shard_size=25)
    rows = profiles.rows_of(profiles.spec(1), profile)
    workers.run_all(
        [s for row in rows for s in profiles.runs_of(row, profile).values()],
        store,
        device='cpu',
        progress=False,
        **how,
    )
    monkeypatch.setenv('RAB_RUNS', str(store))
    found = tables.finish(profiles.spec(1), profile, compute=False, statistics=None)
    assert len(found) == len(rows) == 24
    return tables.beside_paper(
        tables.with_means(tables.tidy(found, profiles.spec(1))), profiles.spec(1)
    ).to_csv(index=False)


def test_dask_table(cluster, tmp_path, monkeypatch, outcome):
    "none: quick Table 1 from two Dask workers and from this process"
    text = table1(tmp_path / 'dask', monkeypatch, scheduler=cluster.address)
    assert text == table1(tmp_path / 'local', monkeypatch, n_jobs=1)
    assert text.count('\n') > 500
    outcome(f'table1.csv is the same to the byte ({len(text)} bytes)')


def test_dask_worker_killed(settings, cluster, tmp_path, undisturbed, outcome):
    "kill -9 of a Dask worker in mid-shard"
    run = client(settings, tmp_path, '--scheduler', cluster.address)
    until(lambda: len(written(settings, tmp_path)) >= 3, 'finished shards')
    cluster.workers[0].kill()
    cluster.add_worker()
    _, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    complete(settings, tmp_path, undisturbed)
    outcome('the other worker took over, result identical')


def test_dask_scheduler_killed(settings, cluster, tmp_path, undisturbed, outcome):
    "kill -9 of the Dask scheduler; scheduler and workers started again at the same address"
    run = client(settings, tmp_path, '--scheduler', cluster.address)
    until(lambda: len(written(settings, tmp_path)) >= 3, 'finished shards')
    before = written(settings, tmp_path)
    cluster.stop()
    cluster.scheduler, cluster.workers = (
        cluster.start('scheduler', '--host', '127.0.0.1', '--port', cluster.port, '--no-dashboard'),
        [],
    )
    cluster.add_worker()
    cluster.add_worker()
    _, errors = run.communicate(timeout=240)
    assert run.returncode == 0 and 'lost the scheduler' in errors, errors
    assert before.items() <= written(settings, tmp_path).items()
    complete(settings, tmp_path, undisturbed)
    outcome('the same client waited, said so, and asked only for what was missing; result identical')


def test_dask_scheduler_gone(settings, tmp_path, outcome):
    "no Dask scheduler at the address"
    with pytest.raises(ConnectionError, match='no Dask scheduler answered at tcp://127.0.0.1:1 '):
        list(
            workers.compute_on_cluster(
                [workers.Job(workers.open_run(settings, tmp_path), range(2))], 'tcp://127.0.0.1:1', patience=2
            )
        )
    outcome('a clear error after the time it was given')


def test_dask_client_killed(settings, cluster, tmp_path, undisturbed, outcome):
    "kill -9 of a Dask client, which is run again"
    run = client(settings, tmp_path, '--scheduler', cluster.address)
    until(lambda: len(written(settings, tmp_path)) >= 3, 'finished shards')
    run.kill()
    run.wait()
    before = written(settings, tmp_path)
    complete(settings, tmp_path, undisturbed, scheduler=cluster.address)
    assert before.items() <= written(settings, tmp_path).items()
    outcome(f'{len(before)} shards were finished and not computed again, result identical')


def test_dask_resources(cluster, tmp_path, outcome):
    "none: a CUDA run on a cluster where one worker of three announces a GPU"
    cluster.add_worker('--resources', 'GPU=1', '--name', 'with-gpu')

    def where(settings, models):
        from distributed import get_worker

        return {'worker': np.frombuffer(str(get_worker().name)[:8].encode(), np.uint8)[None]}

    workers.register('where', where)
    r = workers.run(
        dict(kind='where', n_models=4, shard_size=1, train={}),
        tmp_path,
        scheduler=cluster.address,
        device='cuda',
        progress=False,
    )
    assert {bytes(row) for row in r.arrays('worker')} == {b'with-gpu'}
    outcome('all shards were computed by that worker')


def test_dask_shard_fails(cluster, tmp_path, outcome):
    "a file that the Dask workers do not have"

    def shard(settings, models):
        open('/there/is/no/such/file')

    workers.register('failing', shard)
    with pytest.raises(RuntimeError, match='shard 0-0 of run .* failed on Dask: FileNotFoundError'):
        workers.run(
            dict(kind='failing', n_models=1, shard_size=1),
            tmp_path,
            scheduler=cluster.address,
            progress=False,
        )
    assert not list(tmp_path.rglob('*.part'))
    outcome(
        'tried three times, then an error that names the shard and the file; not taken for a lost scheduler'
    )


# ---- damaged files ------------------------------------------------------------------------------
DAMAGE = {
    'truncated': lambda b, other: b[: len(b) // 2],
    'bit-flipped': lambda b, other: b[:-5] + bytes([b[-5] ^ 16]) + b[-4:],
    'empty': lambda b, other: b'',
    'of another setting': lambda b, other: other,
    'random bytes': lambda b, other: np.random.default_rng(0).bytes(len(b)),
}


@pytest.mark.parametrize('how', DAMAGE)
def test_damaged_shard(settings, how, tmp_path, undisturbed, outcome):
    "a shard file damaged on disk"
    settings |= {'seconds': 0}
    r = workers.run(settings, tmp_path, n_jobs=1, progress=False)
    other = workers.run(settings | {'n_points': 17}, tmp_path, n_jobs=1, progress=False)
    fifth = r.shards[4]
    r.path(fifth).write_bytes(DAMAGE[how](r.path(fifth).read_bytes(), other.path(fifth).read_bytes()))
    with pytest.raises(store.ShardError):
        r.arrays('probabilities')
    assert cli.main(['runs', 'verify', '--store', str(tmp_path)]) == 1
    before = written(settings, tmp_path)
    with pytest.warns(UserWarning, match='00008-00009.safetensors .*computed again'):
        complete(settings, tmp_path, undisturbed)
    assert [n for n, inode in written(settings, tmp_path).items() if before[n] != inode] == [
        '00008-00009.safetensors'
    ]
    outcome(f'{how}: detected, said, only that shard computed again, result identical')


def test_damaged_settings(settings, tmp_path, undisturbed, outcome):
    "settings.json damaged, or of another run"
    settings |= {'seconds': 0}
    r = workers.run(settings, tmp_path, n_jobs=1, progress=False)
    for content in (b'', b'{', b'[' * 100_000, b'{"kind": "drill"}', b'\xff\xfe'):
        (r.folder / 'settings.json').write_bytes(content)
        r.path(r.shards[0]).unlink()
        assert cli.main(['runs', 'list', '--store', str(tmp_path)]) == 1
        complete(settings, tmp_path, undisturbed)
        assert store.read_settings(r.folder) == r.key
    outcome('listed as damaged, written again by the next run, result identical')


# ---- disks --------------------------------------------------------------------------------------
@contextlib.contextmanager
def small_disk(folder, size):
    "A tmpfs of `size` bytes; skips where mounting is not allowed."
    folder.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True
    ).returncode:
        pytest.skip('mounting a tmpfs needs root')
    try:
        yield folder
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


def test_disk_full(settings, tmp_path, undisturbed, outcome):
    "disk full in the middle of a run (a tmpfs of 256 kB)"
    settings |= {'seconds': 0, 'n_points': 2000}
    with small_disk(tmp_path / 'disk', 256 * 1024) as store:
        with pytest.raises(OSError, match='no space left for the run store .*finished shards are safe') as e:
            workers.run(settings, store, n_jobs=1, progress=False)
        assert e.value.errno == errno.ENOSPC and not list(store.rglob('.*.part'))
        assert cli.main(['runs', 'verify', '--store', str(store)]) == 0
        before = written(settings, store)
        assert 0 < len(before) < 12
        subprocess.run(['mount', '-o', 'remount,size=4M', store], check=True)
        complete(settings, store, undisturbed)
        assert before.items() <= written(settings, store).items()
    outcome(
        f'clear error, store valid with {len(before)} shards; after making space the run goes on, '
        'result identical'
    )


def test_quota(settings, tmp_path, undisturbed, outcome):
    "a file size limit (ulimit -f) that no shard fits into"
    settings |= {'seconds': 0, 'n_points': 20_000}
    (tmp_path / 'wanted.json').write_text(json.dumps(settings))
    command = f'{BIN}/rab-nb run --settings {tmp_path}/wanted.json --store {tmp_path} --jobs 2 --quiet'
    line = f'ulimit -f 64; exec {command}'
    done = subprocess.run(['bash', '-c', line], capture_output=True, text=True, timeout=240)
    assert (
        done.returncode == 2
        and 'no space left for the run store' in done.stderr
        and not list(tmp_path.rglob('.*.part'))
    ), done.stderr
    complete(settings, tmp_path, undisturbed)
    outcome('clear error, nothing half-written; without the limit the run completes')


def test_read_only_store(settings, tmp_path, undisturbed, outcome):
    "a read-only store"
    settings |= {'seconds': 0}
    with small_disk(tmp_path / 'disk', 2**20) as store:
        workers.run(settings, store, n_jobs=1, progress=False)
        subprocess.run(['mount', '-o', 'remount,ro', store], check=True)
        complete(settings, store, undisturbed)
        with pytest.raises(PermissionError, match='cannot be written: pass another store or set RAB_RUNS'):
            workers.run(settings | {'n_models': 25}, store, n_jobs=1, progress=False)
    outcome('a finished run is read as ever; a new one is refused with what to do')


# ---- clients and clocks -------------------------------------------------------------------------
LOGGED = '''
import os, sys, time, numpy as np
from rab_nb import workers
def shard(settings, models):
    with open(sys.argv[2], 'a') as log: log.write(f'{models.start}\\n')
    time.sleep(.1)
    return {'a': np.full((1, 2, 2), models.start, np.float32)}
workers.register('logged', shard)
print(flush=True); sys.stdin.readline()
r = workers.run(dict(kind='logged', n_models=40, shard_size=1), sys.argv[1], n_jobs=1, progress=False)
assert (r.arrays('a')[:, 0, 0] == np.arange(40)).all()
'''


def test_two_clients(tmp_path, outcome):
    "two clients filling the same store at once, one of them killed"

    def start():
        return subprocess.Popen(
            [sys.executable, '-c', LOGGED, tmp_path / 'store', tmp_path / 'log'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    clients = [start(), start(), start()]
    for c in clients:
        c.stdout.readline()
    for c in clients:
        c.stdin.write('go\n')
        c.stdin.flush()
    log = tmp_path / 'log'
    until(lambda: log.exists() and len(log.read_text().split()) > 8, 'some shards')
    clients[2].kill()
    assert [c.wait(240) for c in clients] == [0, 0, -9]
    computed = log.read_text().split()
    assert set(map(int, computed)) == set(range(40)) and len(computed) <= 41
    assert not list(tmp_path.rglob('.*.part'))
    outcome(
        f'{len(computed)} computations for 40 shards: each once, but for the one that the killed client '
        'was at'
    )


def test_clock_moved_back(settings, tmp_path, undisturbed, outcome):
    "files dated in the future, and a clock that runs backwards"
    back = (
        'import sys, time, itertools; n = itertools.count(); time.time = lambda: 1e9 - next(n)\n'
        'from rab_nb.cli import main; sys.exit(main(sys.argv[1:]))'
    )
    settings |= {'seconds': 0.05}
    (tmp_path / 'wanted.json').write_text(json.dumps(settings))
    command = [
        sys.executable,
        '-c',
        back,
        'run',
        '--settings',
        tmp_path / 'wanted.json',
        '--store',
        tmp_path,
        '--jobs',
        '1',
        '--quiet',
    ]
    half = subprocess.Popen(command)
    until(lambda: len(written(settings, tmp_path)) >= 3, 'finished shards')
    half.kill()
    half.wait()
    for p in tmp_path.rglob('*'):
        os.utime(p, (4e9, 4e9))
    before = written(settings, tmp_path)
    subprocess.run(command, check=True, timeout=240, stdout=subprocess.DEVNULL)
    assert before.items() <= written(settings, tmp_path).items()
    complete(settings, tmp_path, undisturbed)
    outcome('no effect: no decision reads a clock; result identical')


# ---- limits -------------------------------------------------------------------------------------
MANY = '''
import json, os, sys, psutil, numpy as np
from rab_nb import workers
me, seen = psutil.Process(), []
real = workers.Job.finish
def finish(job, *a):
    real(job, *a)
    if job.models.start % 100 == 99: seen.append((me.memory_info().rss / 2**20, me.num_fds()))
workers.Job.finish = finish
if __name__ == '__main__':
    settings = dict(kind='drill', n_models=1000, shard_size=1, n_points=20_000)
    r = workers.run(settings, sys.argv[1], n_jobs=2, progress=False)
    r.statistics('probabilities')
    seen.append((me.memory_info().rss / 2**20, me.num_fds()))
    print(json.dumps(seen))
'''


def test_thousand_shards(tmp_path, outcome):
    "none: 1,000 shards of 160 kB through two workers, then their statistics"
    (tmp_path / 'many.py').write_text(MANY)
    done = subprocess.run(
        [sys.executable, tmp_path / 'many.py', tmp_path / 'store'],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    memory, handles = zip(*json.loads(done.stdout))
    size = sum(p.stat().st_size for p in tmp_path.rglob('*.safetensors')) / 2**20
    assert size > 150 and max(memory) - memory[0] < 20, memory
    assert max(handles[:-1]) - handles[0] <= 2, handles
    assert len(list(tmp_path.rglob('.*.part'))) == 0
    outcome(
        f'memory {memory[0]:.0f} to {max(memory):.0f} MiB while {size:.0f} MiB passed through, open files '
        f'{handles[0]} to {max(handles)}'
    )
