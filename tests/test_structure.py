"The layout's promises: import order, notebook hygiene, profiles and commands that exist."
import ast
import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

import rab_nb

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / 'nbs').rglob('*.ipynb')
                   if not any(part.startswith(('.', '_')) for part in path.parts[len(ROOT.parts):]))
EXPERIMENTS = [path for path in NOTEBOOKS if path.parent.name == 'experiments']
ROOMS = [  # upper rooms import lower ones; within a row a room may import those to its right
    'cli', 'report', 'tables', 'experiments', 'workers profiles', 'store',
    'evaluation defences estimators ensemble knn attacks models',
    'training metrics certificate data votes quantised',
    'rows pool dp noise features inputs stacked bins chi bounds theory labels']
WIDTH = 110  # columns of code
NOT_YET = set()  # stems of notebooks that are not reformatted yet
PROMISED = {  # what the package offers and nothing inside it calls
    ('bounds', 'empirical_bernstein'), ('bounds', 'betting'), ('bounds', 'clopper_pearson'), ('cli', 'main'),
    ('defences', 'BaggedClassifier'), ('defences', 'PlainKNNClassifier'), ('defences', 'RowCertificate'),
    ('dp', 'clipped_sum'), ('inputs', 'dataset_arrays')}
CORE = {'numpy', 'scipy', 'torch', 'sklearn', 'tqdm', 'rab_nb'}


def cells(path, kind='code'):
    return [''.join(cell['source']) for cell in json.loads(path.read_text())['cells']
            if cell['cell_type'] == kind]


def place(name):
    "Row of a room, counted from the bottom, and its place in the row, counted from the right"
    for height, row in enumerate(reversed(ROOMS)):
        if name in row.split(): return height, -row.split().index(name)
    raise AssertionError(f'{name} has no room in ROOMS')


def imported_at_top(tree):
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def imported_modules(tree):
    "rab_nb modules named anywhere in the file, in functions too"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] == 'rab_nb'):
            parts = [part for part in (node.module or '').split('.') if part not in ('', 'rab_nb')]
            yield from parts[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split('.')[1] for alias in node.names if alias.name.startswith('rab_nb.'))


def test_contributing_draws_the_rooms_as_they_are():
    drawing = (ROOT / 'CONTRIBUTING.md').read_text().split('```\ncli ')[1].split('```')[0].splitlines()
    for drawn, row in zip(['cli ' + drawing[0], *drawing[1:]], ROOMS, strict=True):
        assert drawn.split()[:len(row.split())] == row.split()


MODULES = sorted(path for path in (ROOT / 'rab_nb').glob('*.py') if path.stem not in ('__init__', '_modidx'))


@pytest.mark.parametrize('path', MODULES, ids=lambda path: path.stem)
def test_imports_only_lower_rooms(path):
    for name in imported_modules(ast.parse(path.read_text())):
        assert place(name) < place(path.stem), f'{path.stem} imports {name}, which stands above it'


def public_names(path):
    found = re.search(r'__all__ = (\[.*?\])', path.read_text(), re.S)
    return ast.literal_eval(found[1]) if found else []


def test_no_public_name_twice():
    "A name in code type on the site leads to one place; `main` is what a module does as a command."
    owners = {}
    for path in MODULES:
        for name in public_names(path): owners.setdefault(name, []).append(path.stem)
    twice = {name: modules for name, modules in owners.items() if len(modules) > 1}
    assert set(twice) <= {'main'}, twice


def used_names(source):
    "(module, name) of all that a file takes from the package, by import or as an attribute of a module"
    tree, modules = ast.parse(re.sub(r'^\s*[%!].*', '', source, flags=re.M)), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split('.')[0] == 'rab_nb'):
            room = (node.module or '').removeprefix('rab_nb').lstrip('.')
            for alias in node.names:
                if not room: modules[alias.asname or alias.name] = alias.name
                yield room or rab_nb._ROOMS.get(alias.name), alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


def test_use_is_seen():
    source = ('from rab_nb import theory as t, certify\nfrom rab_nb.noise import rng\n%matplotlib inline\n'
              't.gaussian_radius(1)\nnp.zeros(1)')
    wanted = {('theory', 'gaussian_radius'), ('certificate', 'certify'), ('noise', 'rng')}
    assert wanted == set(used_names(source)) - {(None, 'theory')}


def test_public_names_are_few_and_used():
    """Public is what a user or another page takes from a room, and what CONTRIBUTING's recipes and profiles
    name. The rest is for `#| exporti` or an underscore: it can change without notice."""
    public = {(path.stem, name) for path in MODULES for name in public_names(path)}
    used = {(room, name) for name, room in rab_nb._ROOMS.items()}
    used |= {use for path in MODULES for use in used_names(path.read_text()) if use[0] != path.stem}
    readers = [path for path in NOTEBOOKS if path.parent.name != 'internals']
    for path in readers:
        pages = [source for source in cells(path) if not re.search(r'^#\|\s*export', source, re.M)]
        own = re.findall(r'^#\|\s*default_exp (\w+)', '\n'.join(cells(path)), re.M)
        used |= {use for use in used_names('\n'.join(pages)) if [use[0]] != own}
    profiles = (ROOT / 'nbs/experiments/profiles').glob('*.yaml')
    told = ' '.join(path.read_text() for path in [ROOT / 'CONTRIBUTING.md', *profiles])
    unused = {use for use in public - used if not re.search(rf'\b{use[1]}\b', told)}
    assert not unused - PROMISED, 'names that only their own module uses: #| exporti, or an underscore'
    assert PROMISED <= public - used, 'promised names that do not need the promise any more'
    assert len(public) < 120, len(public)


@pytest.mark.parametrize('path', MODULES, ids=lambda path: path.stem)
def test_core_needs_only_the_core_libraries(path):
    import sys
    top = {name.split('.')[0] for name, _ in imported_at_top(ast.parse(path.read_text()))}
    assert not top - CORE - set(sys.stdlib_module_names), 'import it inside the function that uses it'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_with_title_and_claim(path):
    first = json.loads(path.read_text())['cells'][0]
    assert first['cell_type'] == 'markdown'
    assert re.match(r'# \S.*\n\n> \S', ''.join(first['source']))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_export_cells_are_short(path):
    for source in cells(path):
        if re.search(r'^#\s*\|\s*export', source, re.M):
            assert len(source.splitlines()) <= 40, source[:200]


def crowded(source):
    "Lines of two statements; `if ...: return`, `raise` or `continue` and functions of one line are allowed."
    source = re.sub(r'^\s*[%!].*', '', source, flags=re.M)
    for node in ast.walk(ast.parse(source)):
        for name in ('body', 'orelse', 'finalbody'):
            block = getattr(node, name, [])
            if isinstance(block, list):
                yield from (b.lineno for a, b in zip(block, block[1:]) if a.end_lineno == b.lineno)
        body = getattr(node, 'body', [])
        short = isinstance(node, ast.If) and isinstance(body[0], (ast.Return, ast.Raise, ast.Continue))
        if isinstance(body, list) and body and hasattr(node, 'lineno') and body[0].lineno == node.lineno:
            if not (short or isinstance(node, (ast.FunctionDef, ast.ClassDef))): yield node.lineno


def test_two_statements_on_a_line_are_seen():
    bad = 'a = 1; b = 2', 'for x in y: print(x)', 'with a: b()', 'if a: b = 1', 'try: a()\nexcept E:\n    b()'
    good = 'if a: return', 'def f(x): return x', 'class A: pass', 'for x in y:\n    print(x)', 'f = lambda: 1'
    assert all(list(crowded(source)) for source in bad)
    assert not any(list(crowded(source)) for source in good)


@pytest.mark.parametrize('path', [path for path in NOTEBOOKS if path.stem not in NOT_YET],
                         ids=lambda path: path.stem)
def test_lines_are_for_eyes(path):
    for source in cells(path):
        assert not [line for line in source.splitlines() if len(line) > WIDTH and not line.startswith('#|')]
        assert not list(crowded(source)), source


def test_only_notebooks_that_exist_are_excused():
    assert NOT_YET <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_kernel_and_tags(path):
    notebook = json.loads(path.read_text())
    assert notebook['metadata']['kernelspec']['name'] == 'python3'
    tagged = [cell for cell in notebook['cells'] if 'parameters' in cell['metadata'].get('tags', [])]
    assert len(tagged) == 1 if path in EXPERIMENTS else len(tagged) <= 1


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_no_machine_paths(path):
    assert not re.search(r'/(home|root|work|Users|tmp)/\w', path.read_text())


def test_console_script_exists():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini')
    module, function = ini['DEFAULT']['console_scripts'].split('=')[1].split(':')
    assert re.search(rf'^def {function}\b', (ROOT / (module.replace('.', '/') + '.py')).read_text(), re.M)


def test_readme_commands_exist():
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.M))
    named = set(re.findall(r'\bmake ([a-z][a-z-]*)', (ROOT / 'README.md').read_text()))
    assert named and named <= targets, f'README names unknown make targets: {sorted(named - targets)}'
