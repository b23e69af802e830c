"""The documentation site, `make docs`: nbs/, results/ and the modules -> _site/index.html.

Nothing is executed: pages show the outputs that the notebooks were saved with (`make outputs-check` tells whether they are true)."""
import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

import reference
from links import Files, Names, Numbers, last_sentence, plain, rewrite

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ('paper', 'cpu')  # those whose results are committed, the nearest to the paper first
TUTORIALS = ['own_data', 'own_model', 'embeddings', 'certificate', 'which_noise', 'which_defence', 'scaling', 'errata']  # in reading order; others follow
EXPERIMENTS = ['dnn', 'knn', 'epochs', 'starts', 'dp', 'labels', 'defences', 'bench_ensemble', 'bench_knn']
INTERNALS = ['stacked', 'pool', 'training', 'chi', 'bins', 'rows', 'votes', 'quantised', 'store', 'workers', 'experiments', 'profiles', 'tables', 'report', 'cli']
DIRECTIVE = re.compile(r'^#\s*\|\s*(.+?)\s*$', re.M)
LIMIT = 30e6
markdown = nbformat.v4.new_markdown_cell


def repository():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    return ini['DEFAULT']['git_url']


# ---- which file becomes which page ----------------------------------------------------------------

def page_of(path):
    "nbs/01_noise.ipynb -> noise, nbs/tutorials/own_data.ipynb -> tutorials/own_data, results/cpu/table1.ipynb -> results/cpu/table1"
    inside = Path(path).relative_to('nbs') if path.startswith('nbs/') else Path(path)
    return (inside.parent / re.sub(r'^\d+[a-z]?_', '', inside.stem)).as_posix()


def sources():
    "Repository paths of all notebooks that become pages."
    found = [*(ROOT / 'nbs').rglob('*.ipynb'), *(path for profile in PROFILES for path in (ROOT / 'results' / profile).glob('table[1-9].ipynb'))]
    paths = [path.relative_to(ROOT).as_posix() for path in found if not any(part.startswith(('.', '_')) for part in path.relative_to(ROOT).parts)]
    return sorted(path for path in paths if not path.endswith('.part.ipynb'))


def contents(paths):
    "Sidebar: caption -> pages."
    pick = lambda pattern: [page_of(path) for path in paths if re.match(pattern, path)]
    newest = {number: f'results/{profile}/table{number}' for number in '987654321'[::-1] for profile in reversed(PROFILES)
              if f'results/{profile}/table{number}.ipynb' in paths}
    order = lambda known: lambda page: known.index(Path(page).name) if Path(page).name in known else len(known)
    return {'Tutorials': sorted(pick(r'nbs/tutorials/'), key=order(TUTORIALS)),
            'Theory': pick(r'nbs/0\d\w?_'), 'Algorithms': pick(r'nbs/[1-9]\d\w?_'),
            'Experiments': ['results/index'] * (ROOT / 'results/README.md').exists() + list(newest.values())
            + sorted(pick(r'nbs/experiments/'), key=order(EXPERIMENTS)),
            'Internals': sorted(pick(r'nbs/internals/'), key=order(INTERNALS)),
            'Reference': ['reference/index'], 'Project': ['contributing']}, newest


# ---- one notebook -> one page ---------------------------------------------------------------------

def directives(cell):
    return [line.strip() for line in DIRECTIVE.findall(cell.source)]


def hidden(cell):
    words = {line.split()[0].rstrip(':') for line in directives(cell)}
    return bool(words & {'hide', 'default_exp'}) or 'nbdev_export(' in cell.source


def only_imports(cell):
    lines = [line for line in cell.source.split('\n') if line.strip() and not line.startswith(('#', '%', ' '))]
    return bool(lines) and all(re.match(r'(import|from)\s|\)', line) for line in lines)


def code_tags(cell, page):
    "Tags tell the style sheet what a cell is, and myst-nb what to fold."
    said = [line.replace(' ', '') for line in directives(cell)]
    tags = list(cell.metadata.get('tags', []))
    tags += ['export'] * any(line.startswith('export') for line in said)
    tags += [word for word in ('slow', 'gpu') if word in said]
    if only_imports(cell) or 'code-fold:true' in said or page.startswith('results/'): tags.append('hide-input')
    if page.startswith('results/') and not cell.outputs: tags.append('remove-cell')
    if 'hide_input' in said or 'echo:false' in said: tags.append('remove-input')
    return tags


def alternative_text(cell, prose):
    given = [line.partition(':')[2].strip(' "\'') for line in directives(cell) if line.startswith('fig-alt')]
    return given[0] if given else last_sentence(prose)


def show_code(cell, prose, page):
    cell.metadata.tags, alt = code_tags(cell, page), alternative_text(cell, prose)
    if only_imports(cell): cell.metadata.setdefault('mystnb', {})['code_prompt_show'] = 'Imports'
    if any('image/png' in output.get('data', {}) for output in cell.outputs):
        if not alt: raise SystemExit(f'{page}: no alternative text for the figure of\n{cell.source}\nwrite a sentence before it or `#| fig-alt: ...`')
        cell.metadata.setdefault('mystnb', {})['image'] = {'alt': alt}
    cell.source = DIRECTIVE.sub('', cell.source).lstrip('\n')
    return cell


def opening(text, page, path, module, public):
    "Title and claim, then where the page comes from; a module without public names has no page of its own."
    title, _, claim = text.strip().partition('\n')
    claim = re.sub(r'^>\s?', '', claim.strip(), flags=re.M)
    note = f'Notebook [{path}]({repository()}/blob/main/{path})'
    if module: note += f' · module [rab_nb.{module}](/reference/{module}.md)' if public else f' · module `rab_nb.{module}`'
    parts = [title, f'{{.lead}}\n{claim}' if claim else '', f'{{.origin}}\n{note}' if page != 'index' else '']
    return '\n\n'.join(filter(None, parts))


def table_title(text, path):
    "Six tables share a notebook: each page of results carries its own title."
    facts = (ROOT / path).with_suffix('.json')
    if not path.startswith('results/') or not facts.exists(): return text
    facts = json.loads(facts.read_text())
    return re.sub(r'^# .*$', lambda _: f'# Table {facts["number"]}: {facts["title"]}', text, count=1, flags=re.M)


def local_names(notebook):
    "Names that the page's own code assigns: in its prose they mean the variable, not the package's function."
    found = set()
    for cell in notebook.cells:
        if cell.cell_type != 'code' or any(line.startswith('export') for line in directives(cell)): continue
        try: tree = ast.parse(re.sub(r'^[%!].*$', '', cell.source, flags=re.M))
        except SyntaxError: continue
        found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        found |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return found


def module_of(notebook):
    names = [m[1] for cell in notebook.cells if (m := re.search(r'^#\s*\|\s*default_exp\s+(\w+)', cell.source, re.M))]
    return names[0] if names else ''


class Site:
    def __init__(self, source):
        self.source, self.modules = source, reference.load(ROOT / 'rab_nb')
        self.paths = sources()
        self.toc, newest = contents(self.paths)
        self.names, self.numbers = Names(self.modules), Numbers()
        self.numbers.tables = {number: f'/{page}.ipynb' for number, page in newest.items()}
        pages = {path: f'{page_of(path)}.ipynb' for path in self.paths}
        pages |= {re.sub(r'\.ipynb$', '.md', path): page for path, page in pages.items() if path.startswith('results/')}
        pages |= {'results/README.md': 'results/index.md', 'results': 'results/index.md', 'CONTRIBUTING.md': 'contributing.md', 'README.md': 'index.ipynb'}
        self.files = Files(ROOT, pages, repository(), self.copy)
        self.explained = {}

    def copy(self, path):
        target = self.source / 'files' / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target)
        return f'/files/{path}'

    def link(self, text, path, page, module='', local=()):
        "All links of one Markdown text."
        seen = lambda piece: self.files.link(piece, path)
        return rewrite(text, link=seen, image=seen, prose=lambda piece: self.numbers.link(piece, page),
                       code=lambda piece: piece if piece.strip('`') in local else self.names.link(piece, module))

    def link_outputs(self, cell, path):
        "Markdown that a cell displays: links from the notebook or from results/; others become plain text."
        def seen(piece):
            base = next((base for base in (path, 'results/README.md') if self.files.exists(piece, base)), None)
            return self.files.link(piece, base) if base else plain(piece)

        for output in cell.outputs:
            if 'text/markdown' in output.get('data', {}):
                output.data['text/markdown'] = rewrite(output.data['text/markdown'], link=seen, image=seen)

    def read(self, path):
        notebook = nbformat.read(ROOT / path, 4)
        page, module = page_of(path), module_of(notebook)
        self.remember(notebook, page, module)
        notebook.cells = [cell for cell in notebook.cells if cell.cell_type == 'markdown' or cell.cell_type == 'code' and not hidden(cell)]
        for cell in notebook.cells:
            if cell.cell_type == 'markdown': cell.source = self.numbers.mark(cell.source, page)
        return path, page, module, notebook

    def remember(self, notebook, page, module):
        "Label every section, and note which one defines which public name."
        label, title = '', ''
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == 'markdown':
                for line in re.findall(r'^#{2,4} .*$', cell.source, re.M): label, title = f'at-{page.replace("/", "-")}-{number}', plain(line)
                cell.source = rewrite(cell.source, heading=lambda line: f'({label})=\n{line}' if line.startswith('##') and plain(line) == title else line)
            elif any(line.startswith('export') for line in directives(cell)):
                for name in re.findall(r'^(?:def|class) (\w+)|^(\w+)(?:\s*:.*)?\s*=', cell.source, re.M):
                    self.explained.setdefault((module, ''.join(name)), (page, label, title))

    def write(self, path, page, module, notebook):
        prose, cells, local = '', [], local_names(notebook)
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == 'markdown':
                prose = cell.source
                cell.source = self.link(cell.source, path, page, module, local)
                if number == 0: cell.source = opening(table_title(cell.source, path), page, path, module, module in self.modules)
            else: self.link_outputs(show_code(cell, prose, page), path)
            cells.append(cell)
        notebook.cells = self.front(cells) if page == 'index' else cells
        notebook.metadata = {'kernelspec': notebook.metadata.get('kernelspec', {}), 'language_info': {'name': 'python'}}
        target = self.source / f'{page}.ipynb'
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)

    def front(self, cells):
        "The landing page with the ways on before its first section, and the sidebar."
        first = next((i for i, cell in enumerate(cells) if '\n## ' in '\n' + cell.source), len(cells))
        cards = self.cards((ROOT / 'docs/site/landing.md').read_text())
        trees = [f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(pages) + '\n```' for caption, pages in self.toc.items() if pages]
        return cells[:first] + [markdown(cards)] + cells[first:] + [markdown(text) for text in trees]

    def cards(self, text):
        "A card whose page does not exist (yet) is left out."
        known = {page for pages in self.toc.values() for page in pages}
        exists = lambda card: (m := re.search(r'^:link: (\S+)', card, re.M)) is None or m[1] in known
        return ''.join(part for part in re.split(r'(?=^:::\{grid-item-card\})', text, flags=re.M) if exists(part))

    def write_reference(self):
        folder = self.source / 'reference'
        folder.mkdir(parents=True)
        for name, module in self.modules.items():
            linked = lambda text: rewrite(text, code=lambda piece: self.names.link(piece, name), prose=lambda piece: self.numbers.link(piece, ''))
            (folder / f'{name}.md').write_text(reference.page(module, linked, lambda member: self.where(name, member)))
        (folder / 'index.md').write_text(self.reference_index())

    def where(self, module, member):
        page, label, title = self.explained.get((module, member), ('', '', ''))
        if not page: return ''
        text = re.sub(r'([\[\]])', r'\\\1', f'{page}: {title}' if title else page)
        return f'Explained and tested in [{text}]({"#" + label if label else f"/{page}.ipynb"}).'

    def reference_index(self):
        place = lambda m: next((path for path in self.paths if Path(page_of(path)).name == m.name), '~')
        modules = sorted(self.modules.values(), key=place)
        entry = lambda m: f'## [rab_nb.{m.name}](/reference/{m.name}.md)\n\n{reference.escape(m.doc)}\n\n' + ', '.join(
            f'{{py:obj}}`{x.name} <rab_nb.{m.name}.{x.name}>`' for x in m.members)
        tree = '```{toctree}\n:hidden:\n\n' + '\n'.join(m.name for m in modules) + '\n```'
        intro = 'Every public name: its signature, what each argument holds, the errors it raises and its source. A name in code type anywhere on this site leads here.'
        return '\n\n'.join(['# Reference', f'{{.lead}}\n{intro}', *map(entry, modules), tree]) + '\n'

    def write_text(self, path, page, extra=''):
        if not (ROOT / path).exists(): return
        target = self.source / f'{page}.md'
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.link((ROOT / path).read_text(), path, page) + extra)

    def other_runs(self):
        "Executed tables that the sidebar does not list, below the overview."
        listed = set(self.toc['Experiments'])
        rest = [page_of(path) for path in self.paths if path.startswith('results/') and page_of(path) not in listed]
        titles = [f'Table {page[-1]} ({page.split("/")[1]}) </{page}>' for page in rest]
        return '\n\n```{toctree}\n:caption: Other profiles\n:hidden:\n\n' + '\n'.join(titles) + '\n```\n' if rest else ''

    def build(self):
        read = [self.read(path) for path in self.paths]
        for args in read: self.write(*args)
        self.write_reference()
        self.write_text('results/README.md', 'results/index', self.other_runs())
        self.write_text('CONTRIBUTING.md', 'contributing')
        if self.files.broken: raise SystemExit('links to nowhere:\n' + '\n'.join(self.files.broken))
        shutil.copytree(ROOT / 'docs/site', self.source, dirs_exist_ok=True, ignore=shutil.ignore_patterns('landing.md', '__pycache__'))


# ---- the finished site ----------------------------------------------------------------------------

def prune(site):
    "MathJax comes with a dozen bundles; the pages load one and its fonts."
    mathjax = site / '_static/mathjax'
    keep = ('tex-chtml.js', 'output/chtml/fonts/', 'input/tex/extensions/')
    for path in [path for path in mathjax.rglob('*') if path.is_file()]:
        if not path.relative_to(mathjax).as_posix().startswith(keep): path.unlink()
    for path in [*site.rglob('*.map'), site / '.buildinfo', site / 'objects.inv']: path.unlink(missing_ok=True)


class Page(HTMLParser):
    "Ids, links and images of one HTML page."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.images = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes[key] for key in ('id', 'name') if attributes.get(key)}
        self.links += [attributes[key] for key in ('href', 'src') if attributes.get(key)]
        if tag == 'img': self.images.append(attributes)


EMPTY = re.compile(r'<section[^>]*>\s*(?:<span[^>]*></span>\s*)*<h[1-6].*?</h[1-6]>\s*</section>', re.S)


def check(site):
    "Complaints about links, fragments, alternative texts, empty sections, objects shown by name, and size."
    pages = {path.resolve(): Page(path) for path in site.rglob('*.html')}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        text = path.read_text()
        for section in EMPTY.findall(text): yield f'{name}: nothing stands below {re.sub("<[^>]+>", "", section).strip()!r}'
        if '&lt;IPython.core' in text: yield f'{name}: an object of IPython is shown by its name'
        for image in page.images:
            if not (image.get('alt') or '').strip() or image['alt'] == image['src']: yield f'{name}: {image["src"]} has no alternative text'
        for link in set(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists(): yield f'{name}: {link} leads nowhere'
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids: yield f'{name}: {link} has no such place'
    size = sum(path.stat().st_size for path in site.rglob('*') if path.is_file())
    if size > LIMIT: yield f'the site has {size / 1e6:.1f} MB; at most {LIMIT / 1e6:.0f} MB'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=ROOT / '_site', help='folder of the finished site')
    parser.add_argument('--work', type=Path, default=ROOT / 'build/docs', help='folder of the pages that Sphinx reads')
    args = parser.parse_args()
    for folder in (args.work, args.out): shutil.rmtree(folder, ignore_errors=True)
    Site(args.work / 'source').build()
    html = args.work / 'html'  # myst-nb leaves a folder beside it
    command = [sys.executable, '-W', 'ignore', '-m', 'sphinx', '-b', 'html', '-q', '-W', '--keep-going', '-d', args.work / 'doctrees', args.work / 'source', html]
    if subprocess.run(command).returncode: raise SystemExit('Sphinx complained: see above')
    prune(html)
    shutil.move(html, args.out)
    if complaints := sorted(check(args.out)): raise SystemExit('\n'.join(complaints))
    print(f'{args.out}/index.html: {len(list(args.out.rglob("*.html")))} pages, '
          f'{sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file()) / 1e6:.1f} MB')


if __name__ == '__main__': main()
