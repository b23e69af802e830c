"""Execute notebooks in place and keep what they print, or check that what they print is what they were saved with.

    python docs/notebooks.py [--slow] nbs/02_bounds.ipynb ...
    python docs/notebooks.py --check [--slow] [notebook ...]    (every notebook of nbs/ where none is named)"""
import argparse
import base64
import difflib
import io
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.foundation import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config

COMMIT = re.compile(r'\bCode [0-9a-f]{7,40}( with changes)?')
DIRECTIVE = re.compile(r'^#\s*\|\s*(.+?)\s*$', re.M)


def directives(cell):
    return {d.replace(' ', '') for d in DIRECTIVE.findall(cell.source)}


def passed_over(run_flags=()):
    "Directives whose cells are not run, as settings.ini says, except those asked for."
    return set(get_config().tst_flags.split()) - set(run_flags)


def skipped(cell, flags):
    "Would `nbdev_test` pass over this cell?"
    return cell.cell_type != 'code' or 'nbdev_export(' in cell.source or bool(directives(cell) & (flags | {'eval:false'}))


def run(notebook, path, flags):
    "Execute as nbdev_test would; cells that are skipped keep the outputs they have."
    try:
        with working_directory(path.parent):
            CaptureShell(path.resolve(), mpl_format='png').run_all(notebook, exc_stop=True, preproc=lambda cell: skipped(cell, flags))
    except Exception as error:
        failed = [cell for cell in notebook.cells if any(o['output_type'] == 'error' for o in cell.get('outputs', []))]
        where = f', cell {failed[-1].get("id", "?")}:\n{failed[-1].source}' if failed else ''
        raise RuntimeError(f'{path} does not run{where}\n{type(error).__name__}: {error}') from None
    clean_nb(notebook, allowed_cell_metadata_keys=['tags'])
    return notebook


def texts(cell):
    "What a cell says, by kind; progress bars and warnings on stderr do not count, nor does the commit that a caption names."
    said = {}
    for output in cell.get('outputs', []):
        if output['output_type'] == 'stream':
            if output.get('name') == 'stdout': said['stdout'] = said.get('stdout', '') + ''.join(output['text'])
        for kind, value in output.get('data', {}).items():
            if kind.startswith('text/'): said[kind] = said.get(kind, '') + COMMIT.sub('Code', ''.join(value)) + '\n'
    return said


def figures(cell):
    return [''.join(output['data']['image/png']) for output in cell.get('outputs', []) if 'image/png' in output.get('data', {})]


def blocks(figure, size=8):
    "Grey levels of a base64 PNG, averaged over blocks: a moved curve shows, the smoothing of glyphs does not."
    from PIL import Image
    image = Image.open(io.BytesIO(base64.b64decode(figure))).convert('RGBA')
    grey = np.asarray(Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('L')) / 255
    height, width = (n // size for n in grey.shape)
    return grey[:height*size, :width*size].reshape(height, size, width, size).mean((1, 3))


def same_figure(old, new):
    "At most 1 % of the blocks may differ by more than a tenth of the scale."
    old, new = blocks(old), blocks(new)
    return old.shape == new.shape and np.mean(np.abs(old - new) > .1) < .01


def differences(old, new):
    "What one cell printed or drew before and does not now."
    before, after = texts(old), texts(new)
    for kind in sorted(before.keys() | after.keys()):
        a, b = before.get(kind, ''), after.get(kind, '')
        if a != b: yield '\n'.join(difflib.unified_diff(a.split('\n'), b.split('\n'), f'saved {kind}', 'now', n=1, lineterm=''))
    a, b = figures(old), figures(new)
    if len(a) != len(b): yield f'{len(a)} saved figures, now {len(b)}'
    yield from (f'figure {i} looks different' for i, pair in enumerate(zip(a, b)) if not same_figure(*pair))


def check(path, run_flags=()):
    "Complaints about one notebook: outputs that are no longer what it was saved with."
    saved, flags = read_nb(path), passed_over(run_flags)
    fresh = run(deepcopy(saved), path, flags)
    pairs = [(old, new) for old, new in zip(saved.cells, fresh.cells) if not skipped(old, flags)]
    return [f'{path}, cell {old.get("id", "?")}:\n{old.source[:300]}\n{text}\n' for old, new in pairs for text in differences(old, new)]


def execute(path, run_flags=()):
    "Save fresh outputs."
    write_nb(run(read_nb(path), path, passed_over(run_flags)), path)
    return []


def all_notebooks():
    nbs = get_config().nbs_path
    found = sorted(path for path in nbs.rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in path.relative_to(nbs).parts))
    return [path for path in found if not path.name.endswith('.part.ipynb')]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument('--slow', action='store_true', help='run the cells marked `#| slow` too')
    parser.add_argument('--check', action='store_true', help='change nothing; fail where an output differs from the saved one')
    parser.add_argument('--workers', type=int, default=2, help='notebooks at a time')
    args = parser.parse_args()
    os.environ['IN_TEST'] = '1'
    os.environ['MATPLOTLIBRC'] = str(get_config().nbs_path / 'matplotlibrc')
    complaints = []
    with ProcessPoolExecutor(args.workers, get_context('spawn'), max_tasks_per_child=1) as pool:  # notebooks share no state
        paths = args.notebooks or all_notebooks()
        jobs = [pool.submit(check if args.check else execute, path, ['slow'] if args.slow else []) for path in paths]
        for path, job in zip(paths, jobs):
            try: complaints += job.result()
            except RuntimeError as error: complaints.append(str(error))
            print(path, flush=True)
    if complaints: sys.exit('\n'.join(complaints) + f'\n{len(complaints)} complaints' + '; where the new outputs are right, `make run-nbs` saves them' * args.check)


if __name__ == '__main__': main()
