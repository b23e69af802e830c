"Execute notebooks in place and keep what they print: `python docs/notebooks.py [--slow] nbs/02_bounds.ipynb ...`"
import argparse
import os
import re
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.foundation import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config

DIRECTIVE = re.compile(r'^#\s*\|\s*(.+?)\s*$', re.M)


def directives(cell):
    return {d.replace(' ', '') for d in DIRECTIVE.findall(cell.source)}


def execute(path, run_flags=()):
    "Run one notebook as nbdev_test would, but save outputs; cells that are skipped keep the outputs they have."
    flags = set(get_config().tst_flags.split()) - set(run_flags)

    def skip(cell):
        return cell.cell_type != 'code' or 'nbdev_export(' in cell.source or bool(directives(cell) & (flags | {'eval:false'}))

    notebook = read_nb(path)
    with working_directory(path.parent):
        CaptureShell(path.resolve(), mpl_format='png').run_all(notebook, exc_stop=True, preproc=skip)
    clean_nb(notebook, allowed_cell_metadata_keys=['tags'])
    write_nb(notebook, path)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebooks', nargs='+', type=Path)
    parser.add_argument('--slow', action='store_true', help='run the cells marked `#| slow` too')
    args = parser.parse_args()
    os.environ['IN_TEST'] = '1'
    os.environ['MATPLOTLIBRC'] = str(get_config().nbs_path / 'matplotlibrc')
    for path in args.notebooks:
        print(path, flush=True)
        execute(path, ['slow'] if args.slow else [])
