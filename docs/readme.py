"README.md from nbs/index.ipynb, `make readme`: hidden cells dropped, directives stripped, links seen from the repository's root."
import base64
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat

from links import last_sentence

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / 'docs/images'
NOTE = '<!-- Written from nbs/index.ipynb by `make readme`; edit the notebook. -->'


def badges():
    "Where a tutorial can be tried without installing anything."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    url, branch, page = ini['DEFAULT']['git_url'], ini['DEFAULT']['branch'], 'nbs/tutorials/own_data.ipynb'
    place = url.removeprefix('https://github.com/')
    colab = f'https://colab.research.google.com/github/{place}/blob/{branch}/{page}'
    binder = f'https://mybinder.org/v2/gh/{place}/{branch}?labpath={page}'
    return (f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})\n'
            f'[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})\n\n'
            f'(In Colab, run `%pip install git+{url}` first.)')


def pipe_table(html):
    "A data frame's HTML as a Markdown table."
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row, re.S) for row in re.findall(r'<tr.*?</tr>', html, re.S)]
    lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
    return '\n'.join([lines[0], '|---' * len(rows[0]) + '|', *lines[1:]])


def shown(output, alt, number):
    "One output as Markdown; a figure becomes a file beside this script."
    data = output.get('data', {})
    if 'image/png' in data:
        IMAGES.mkdir(exist_ok=True)
        (IMAGES / f'index-{number}.png').write_bytes(base64.b64decode(data['image/png']))
        return f'![{alt}](docs/images/index-{number}.png)'
    if '<table' in data.get('text/html', ''): return pipe_table(data['text/html'])
    text = data.get('text/plain', output.get('text', '') if output.get('name') == 'stdout' else '')
    return f'```\n{text.rstrip()}\n```' if text else ''


def from_root(text):
    "Links of a notebook in nbs/ as links of a file in the root."
    text = re.sub(r'\]\((?![a-z]+:|#|\.\./|docs/)([\w/.-]+)', r'](nbs/\1', text)
    return text.replace('](../', '](')


def readme(notebook):
    parts, alt = [NOTE], ''
    for number, cell in enumerate(notebook.cells):
        if re.match(r'#\s*\|\s*(hide|default_exp)', cell.source): continue
        if cell.cell_type == 'markdown':
            parts.append(from_root(cell.source))
            if number == 0: parts.append(badges())
            alt = last_sentence(cell.source)
        else:
            said = re.search(r'^#\s*\|\s*fig-alt:\s*(.*)', cell.source, re.M)
            if not re.search(r'^#\s*\|\s*echo:\s*false', cell.source, re.M):
                parts.append('```python\n' + re.sub(r'^#\s*\|.*\n', '', cell.source, flags=re.M) + '\n```')
            parts += [shown(output, said[1] if said else alt, number) for output in cell.outputs]
    return '\n\n'.join(filter(None, parts)) + '\n'


if __name__ == '__main__':
    (ROOT / 'README.md').write_text(readme(nbformat.read(ROOT / 'nbs/index.ipynb', 4)), encoding='utf-8')
