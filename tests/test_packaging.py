"The package builds as wheel and sdist and imports where only the core libraries are."
import configparser
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    source = tmp_path_factory.mktemp('source')
    files = run('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=ROOT).split('\n')
    for name in filter(None, files):
        if name.startswith(('rab_nb/', 'setup', 'settings', 'pyproject', 'MANIFEST', 'README', 'LICENSE',
                            'CITATION', 'constraints', 'nbs/experiments/profiles')):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, '-m', 'build', '--outdir', source / 'dist', source)
    return source / 'dist'


def test_wheel_holds_modules_and_numbers(built):
    [wheel] = built.glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f'rab_nb/{path.name}' for path in (ROOT / 'rab_nb').iterdir()
               if path.suffix in ('.py', '.csv')}
    assert modules <= names
    assert {f'rab_nb/_profiles/{name}.yaml' for name in ('quick', 'cpu', 'paper')} <= names
    assert not {name for name in names if name.startswith(('nbs', 'tests', 'results'))}


def test_description_reads_on_an_index_page(built):
    "Links and pictures lead somewhere from outside of the repository, and no formula is left in TeX."
    import re
    [wheel] = built.glob('*.whl')
    with zipfile.ZipFile(wheel) as z:
        [name] = [name for name in z.namelist() if name.endswith('METADATA')]
        text = z.read(name).decode()
    assert 'Description-Content-Type: text/markdown' in text
    body = re.sub(r'```.*?```', '', text.partition('\n\n')[2], flags=re.S)
    targets = re.findall(r'\]\(([^)\s]+)\)', body)
    assert len(targets) > 20 and [t for t in targets if not t.startswith(('https://', '#'))] == []
    assert '$' not in body and not re.search(r'\\[a-z]{2,}', body)


@pytest.mark.parametrize('python', ['3.11.0', '3.12.0', '3.13.0'])
def test_pins_allow_every_python_that_is_promised(python):
    "Packages are judged by what the installed version says, where it is the pinned one."
    from importlib import metadata
    from packaging.specifiers import SpecifierSet
    judged, refused = 0, []
    for line in (ROOT / 'constraints.txt').read_text().splitlines():
        name, _, version = line.partition('#')[0].strip().partition('==')
        try:
            found = metadata.distribution(name) if version else None
        except metadata.PackageNotFoundError:
            continue
        if found is None or found.version.split('+')[0] != version: continue
        judged += 1
        if python not in SpecifierSet(found.metadata['Requires-Python'] or ''): refused.append(line)
    assert judged > 50 and not refused


def test_sdist_installs_and_every_module_imports(built, tmp_path):
    [sdist] = built.glob('*.tar.gz')
    venv.create(tmp_path / 'env', with_pip=True, system_site_packages=False)
    python = tmp_path / 'env/bin/python'
    run(python, '-m', 'pip', 'install', '--quiet', '--no-deps', sdist)
    site = run(sys.executable, '-c',
               'import numpy, pathlib; print(pathlib.Path(numpy.__file__).parent.parent)').strip()
    script = f'''
import importlib, pathlib, sys
sys.path.append({site!r})
blocked = {{'nbdev', 'fastcore', 'papermill', 'opacus', 'dask', 'distributed', 'torchvision', 'yaml'}}
class Block:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in blocked: raise ImportError(name + ' is absent on a bare node')
sys.meta_path.insert(0, Block())
import rab_nb
folder = pathlib.Path(rab_nb.__file__).parent
assert 'env' in str(folder), folder
for path in sorted(folder.glob('[a-z]*.py')):
    importlib.import_module('rab_nb.' + path.stem); print(path.stem)
'''
    printed = run(python, '-I', '-c', script, cwd=tmp_path)
    assert 'ensemble' in printed and 'workers' in printed


def test_tables_have_what_they_call():
    "The extra of tables holds what drawing one asks for, Opacus for the captions of Tables 4-6 among it."
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    names = {re.match(r'[\w-]+', name)[0] for name in ini['DEFAULT']['tables_requirements'].split()}
    [asked] = re.findall(r"check_extra\('tables', '[^']*', (.*)\)", (ROOT / 'rab_nb/report.py').read_text())
    needed = set(re.findall(r"'([\w-]+)'", asked))
    private = re.findall(r"check_extra\('dp', \w+, '(\w+)'\)", (ROOT / 'rab_nb/dp.py').read_text())
    assert private and {*needed, *private} <= names
