"""Ten minutes of a GPU: stages that are processes of their own, each with a deadline, results written after each.

The parent imports nothing but the standard library, so that nothing that breaks in a stage can take the others with it.
What comes out are at most six files of at most 10 MB: blocks of Tables 1, 4 and 2, gpu.csv, profile.txt and log.txt.
Bring blocks home with `rab-nb merge OUT/table1.safetensors --into results/paper/table1.safetensors`."""
import argparse
import csv
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 10 * 10**6
COLUMNS = ['what', 'table', 'device', 'precision', 'stack', 'visits_per_second', 'seconds', 'value', 'unit']

# Stage, share of the limit at which it has to be over, its arguments
STAGES = [('environment', .12), ('measure', .25), ('table 1', .75), ('table 4', .93), ('table 2', .97)]


# ---- the parent -----------------------------------------------------------------------------------
def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--limit', type=float, default=540,
                        help='seconds for everything (default: %(default)s)')
    parser.add_argument('--out', default=os.environ.get('OUT', 'build/gpu'),
                        help='folder for the results (default: $OUT, else build/gpu)')
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument('--profile', help='default: paper on cuda, quick on cpu')
    parser.add_argument('--models', type=int, help='models per run, instead of as many as the profile says')
    parser.add_argument('--rows', type=int, nargs='+',
                        help='rows of Tables 1 and 4 (default: all on cuda; 1 and 2 on cpu, which is a rehearsal)')
    parser.add_argument('--beside', nargs='*', default=[],
                        help='folders of blocks whose models are not computed')
    parser.add_argument('--stage', help=argparse.SUPPRESS)
    parser.add_argument('--work', help=argparse.SUPPRESS)
    parser.add_argument('--until', type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    args.profile = args.profile or ('paper' if args.device == 'cuda' else 'quick')
    if args.rows is None and args.device == 'cpu': args.rows = [1, 2]
    if args.limit <= 0: parser.error(f'--limit must be > 0 seconds, got {args.limit:g}')
    return args


def stop(process):
    "Ask a stage to end, so that it keeps its blocks, then make it."
    process.send_signal(signal.SIGTERM)
    try: process.wait(4)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run_stage(name, seconds, args, log):
    "One stage as a process; its last words are kept in the log."
    command = [sys.executable, __file__, '--stage', name, '--until', str(seconds), '--out', args.out,
               '--work', args.work, '--device', args.device,
               '--profile', args.profile, '--limit', str(args.limit),
               *(['--models', str(args.models)] if args.models else []),
               *(['--rows', *map(str, args.rows)] if args.rows else []),
               *(['--beside', *args.beside] if args.beside else [])]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    try: process.wait(seconds)
    except subprocess.TimeoutExpired: stop(process)
    return process.returncode, time.monotonic() - start


def pack(out):
    "Only whole files that are small enough stay; says what is there."
    for path in sorted(out.iterdir()):
        if path.name.startswith('.'): path.unlink()
        elif path.stat().st_size > MAX_BYTES:
            print(f'{path.name} has {path.stat().st_size} bytes, more than {MAX_BYTES}, and is left out')
            path.unlink()
    return {path.name: path.stat().st_size for path in sorted(out.iterdir())}


def main(args):
    begun = time.monotonic()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if left := [p.name for p in out.iterdir()]:
        sys.exit(f'{out} is not empty ({left[0]}): name another folder with --out')
    args.out, args.work = str(out), tempfile.mkdtemp(prefix='rab_nb_gpu_')
    try:
        with open(out / 'log.txt', 'a') as log:
            for name, share in STAGES:
                left = share * (args.limit - 6) - (time.monotonic() - begun)
                if left < 2: said = 'left out, no time'
                else:
                    print(f'==== {name}, {left:.0f} s at most', file=log, flush=True)
                    code, took = run_stage(name, left, args, log)
                    said = f'{took:.1f} s, ' + ('finished' if code == 0 else f'exit code {code}')
                print(f'---- {name}: {said}', file=log, flush=True)
                print(f'{name}: {said}', flush=True)
    finally: shutil.rmtree(args.work, ignore_errors=True)
    print(json.dumps(pack(out)), f'{time.monotonic() - begun:.1f} s')
    return 0


# ---- stages ---------------------------------------------------------------------------------------
def note(args, **row):
    "A line of gpu.csv, on disk at once."
    path = Path(args.out) / 'gpu.csv'
    new = not path.exists()
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        if new: writer.writeheader()
        writer.writerow(row)


def profile_file(args):
    "The profile, or a copy of it with another number of models."
    from rab_nb import profiles
    if not args.models: return args.profile
    import yaml
    profile = yaml.safe_load(profiles.profile_path(args.profile).read_text())
    for part in ('ensemble', 'dp'):
        for how in profile[part].values():
            if part == 'ensemble' or 'n_models' in how:
                how.update(n_models=args.models, shard_size=args.models)
            if part == 'ensemble': how.update(stack=args.models)
    path = Path(args.work) / 'profile.yaml'
    path.write_text(yaml.safe_dump(profile))
    return str(path)


def environment(args):
    "What this machine is, and whether it computes what the CPU computes."
    from importlib.metadata import PackageNotFoundError, version
    import torch
    about = dict(python=platform.python_version(), machine=platform.machine(), cpus=os.cpu_count(),
                 data=sorted(p.name for p in Path(os.environ['RAB_DATA']).glob('*.npz')))
    for name in ('torch', 'numpy', 'scipy', 'scikit-learn', 'pandas', 'safetensors', 'filelock'):
        try: about[name] = version(name)
        except PackageNotFoundError: about[name] = None
    if args.device == 'cuda':
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        about |= dict(gpu=properties.name, processors=properties.multi_processor_count, free=free,
                      total=total, cuda=torch.version.cuda,
                      cudnn=torch.backends.cudnn.version(),
                      tf32=[torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32])
    print(json.dumps(about, indent=1), flush=True)
    return same_as_cpu(args)


class DrawnOnCpu:
    "Noise whose numbers do not depend on the device, so that two devices train on the same rows."
    def __init__(self, noise): self.noise = noise

    def __repr__(self): return f'DrawnOnCpu({self.noise!r})'

    def sample(self, shape, generator):
        import torch
        return self.noise.sample(shape,
                                 torch.Generator().manual_seed(generator.initial_seed())).to(generator.device)


def same_as_cpu(args):
    "The same few networks on both: equal up to rounding in float32, near in bf16, the same bits twice, nothing that is not finite."
    from dataclasses import replace
    import numpy as np
    from rab_nb import data, models, training
    from rab_nb.noise import GaussianNoise
    task = data.load('digits', [0, 1])
    spec = training.TrainSpec(models.digits_cnn, DrawnOnCpu(GaussianNoise(.5)), epochs=2, batch_size=32,
                              lr=1e-3, precision='float32', device='cpu')
    def answers(**change):
        shard = training.train_shard(replace(spec, **change), task.x_train, task.y_train,
                                     {'test': task.x_test}, range(4))
        return shard['probabilities']['test']
    cpu, wrong = answers(stack=1), 0
    for stack in (1, 4):
        for precision, most in (('float32', .01), ('bf16', .1)):
            here, again = (answers(stack=stack, precision=precision, device=args.device) for _ in range(2))
            gap, bits = float(np.abs(here - cpu).max()), bool((here == again).all())
            sound = bool(np.isfinite(here).all()) and gap < most
            wrong += not sound
            print(f"stack {stack}, {precision}: largest difference from the CPU {gap:.2e} ({'sound' if sound else 'WRONG'}), the same bits twice: {bits}", flush=True)
            note(args, what='largest difference from the CPU', device=args.device, precision=precision,
                 stack=stack, value=gap)
    return int(wrong > 0)


def seconds_of(f, args, repeats=3):
    "Median time of a call, after one to warm up."
    import torch
    wait = torch.cuda.synchronize if args.device == 'cuda' else lambda: None
    f()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def ceilings(args):
    "Bandwidth of a copy, rate of a bf16 product."
    import torch
    n, m = (2**28, 8192) if args.device == 'cuda' else (2**24, 512)
    x, y = torch.zeros(n, device=args.device), torch.empty(n, device=args.device)
    s = seconds_of(lambda: y.copy_(x), args)
    note(args, what='copy', device=args.device, precision='float32', seconds=s, value=8e-9 * n / s,
         unit='GB/s')
    a, b = (torch.randn(m, m, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    s = seconds_of(lambda: a @ b, args)
    note(args, what='product', device=args.device, precision='bf16', seconds=s, value=2e-12 * m**3 / s,
         unit='TFLOP/s')


def networks(args):
    "Training settings and some data of Tables 1, 4, 2 and 5, where the data are here."
    from rab_nb import experiments, profiles
    for table in (1, 4, 2, 5):
        settings = next(s for s in profiles.settings_for(table, profile_file(args)) if s['kind'] == 'dnn')
        try: yield table, settings, experiments.poisoned_task(settings)
        except (ValueError, OSError) as error: print(f'table {table}: {error}', flush=True)


def measure(args):
    "Ceilings, sample visits per second of the tables' networks, and where the time of a step goes."
    from dataclasses import replace
    import torch
    from rab_nb import experiments, training
    ceilings(args)
    for table, settings, task in networks(args):
        steps = 20 if args.device == 'cuda' else 2
        spec = replace(experiments.train_spec(settings, args.device), epochs=1, n_classes=task.n_classes)
        n = min(len(task.x_train), steps * spec.batch_size)
        spec = training.resolved(spec, (n, *task.x_train.shape[1:]))
        train = lambda: training.train_shard(spec, task.x_train[:n], task.y_train[:n], {}, range(spec.stack))
        s = seconds_of(train, args, repeats=1)
        note(args, what='training', table=table, device=args.device, precision=spec.precision,
             stack=spec.stack, visits_per_second=n * spec.stack / s, seconds=s)
        if table != 1: continue
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (args.device == 'cuda')
        with torch.profiler.profile(activities=kinds) as profiler: train()
        by = 'self_cuda_time_total' if args.device == 'cuda' else 'self_cpu_time_total'
        (Path(args.out) / 'profile.txt').write_text(profiler.key_averages().table(sort_by=by, row_limit=20,
                                                                                  max_name_column_width=60))
    return 0


def table(args, number):
    "Blocks of a table; of Table 2 the first row and pair only."
    from rab_nb.cli import main
    few = ['--rows', '1', '--pairs', '1'] if number == 2 else ['--rows',
                                                               *map(str, args.rows)] if args.rows else []
    beside = ['--beside', *args.beside] if args.beside else []
    jobs = ['--jobs', '1'] if args.device == 'cuda' or args.models else []
    return main(['run', '--table', str(number), '--profile', profile_file(args), '--device', args.device,
                 '--statistics', args.out, '--store', str(Path(args.work) / 'runs'),
                 '--time-limit', str(args.until), '--quiet', *few, *beside, *jobs])


def stage(args):
    if args.stage.startswith('table'): return table(args, int(args.stage.split()[1]))
    return {'environment': environment, 'measure': measure}[args.stage](args)


if __name__ == '__main__':
    args = arguments()
    sys.exit(stage(args) if args.stage else main(args))
