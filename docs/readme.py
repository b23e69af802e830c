"README.md from nbs/index.ipynb: hidden cells dropped, directives stripped, links made relative to the repository."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
notebook = nbformat.read(root / 'nbs/index.ipynb', 4)
notebook.cells = [cell for cell in notebook.cells if not re.match(r'#\s*\|\s*(hide|default_exp)', cell.source)]
for cell in notebook.cells:
    if cell.cell_type == 'code':
        cell.source = re.sub(r'^#\s*\|.*\n', '', cell.source, flags=re.M)
notebook.metadata['language_info'] = {'name': 'python'}
body, resources = MarkdownExporter().from_notebook_node(notebook)
for name, content in resources['outputs'].items():
    (root / 'docs/images').mkdir(exist_ok=True)
    (root / 'docs/images' / name).write_bytes(content)
    body = body.replace(f'({name})', f'(docs/images/{name})')
body = re.sub(r'\]\((?!https?:|#|\.\./|docs/)([\w/.-]+\.(?:ipynb|yaml))', r'](nbs/\1', body)
body = re.sub(r'\]\(\.\./', '](', body)
note = '<!-- Written from nbs/index.ipynb by `make readme`; edit the notebook. -->\n\n'
(root / 'README.md').write_text(note + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n', encoding='utf-8')
