"Prose that links itself: backticked public names, the paper's equations, tables and theorems, files of the repository."
import os
import re
from pathlib import Path

# What a rewrite must not touch, in the order in which Markdown looks for it.
PROTECTED = re.compile(r'''(?P<fence>^(?P<tick>`{3,}|~{3,}).*?^(?P=tick)[`~]*[ \t]*$)|(?P<display>\$\$.*?\$\$)|(?P<heading>^\#{1,6}[ ].*?$)
                           |(?P<code>(?P<run>`+)(?!`).*?(?<!`)(?P=run)(?!`))|(?P<math>(?<![\\$])\$(?!\s)[^$]+?(?<!\s)\$)
                           |(?P<image>!\[[^\]]*\]\([^)]*\))|(?P<link>\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\))|(?P<target>^\([\w.-]+\)=$|\[\*\*[^\]]*\*\*\]\{\#[\w-]+\})|(?P<html><[a-zA-Z/!][^>]*>)''',
                       re.M | re.S | re.X)
KINDS = ('fence', 'display', 'heading', 'code', 'math', 'image', 'link', 'target', 'html')
BOLD = re.compile(r'\*\*((?:Theorem|Corollary|Lemma|Proposition|Algorithm|Definition)\s+\d+)(\.?)\*\*')
STATEMENT = re.compile(r'\b(Theorem|Corollary|Lemma|Proposition|Algorithm|Definition)\s+(\d+)\b')
TABLES = re.compile(r'\bTables?\s+\d\b(?!\.\d)(?:\s*(?:,|and|to|or|-|–)\s*\d\b)*')


def split(text):
    "(kind, piece) of a Markdown text; prose has the kind ''."
    at = 0
    for match in PROTECTED.finditer(text):
        if match.start() > at: yield '', text[at:match.start()]
        yield next(kind for kind in KINDS if match[kind] is not None), match[0]
        at = match.end()
    if at < len(text): yield '', text[at:]


def rewrite(text, **rules):
    "Apply `rules[kind]` to the pieces of that kind; `prose` names the rest."
    keep = lambda piece: piece
    return ''.join(rules.get(kind or 'prose', keep)(piece) for kind, piece in split(text))


class Names:
    "Backticked public names -> roles of Sphinx's Python domain."

    def __init__(self, modules):
        self.modules, self.owners, self.parameters = modules, {}, {}
        for module in modules.values():
            self.parameters[module.name] = {a.name.strip('*') for m in module.members for a in all_parameters(m)}
            for member in module.members:
                self.add(module, member.name)
                for inner in member.members: self.add(module, f'{member.name}.{inner.name}')

    def add(self, module, name): self.owners.setdefault(name, []).append(f'rab_nb.{module.name}.{name}')

    def find(self, code, page_module=''):
        "Full name behind what a pair of backticks holds, or None."
        name = re.sub(r'\(.*\)$', '', code.strip(), flags=re.S)
        if not re.fullmatch(r'[A-Za-z_][\w.]*', name): return None
        if name.startswith('rab_nb.'):
            if name[7:] in self.modules: return name
            name = name[7:]
        module, _, rest = name.partition('.')
        if module in self.modules and f'rab_nb.{name}' in self.owners.get(rest, []): return f'rab_nb.{name}'
        if name == code and name in self.parameters.get(page_module, ()): return None
        return self.nearest(self.owners.get(name, []), page_module)

    def nearest(self, owners, page_module):
        here = [name for name in owners if name.split('.')[1] == page_module]
        return (here or owners)[0] if here or len(owners) == 1 else None

    def link(self, code, page_module=''):
        name = self.find(code.strip('`'), page_module)
        return f'{{py:obj}}`{code.strip("`")} <{name}>`' if name else code


def all_parameters(member):
    return member.arguments + [a for inner in member.members for a in all_parameters(inner)]


class Numbers:
    "The paper's numbers: equations where they are displayed, theorems where they head a section, tables where they are reproduced."

    def __init__(self): self.equations, self.statements, self.tables = {}, {}, {}

    def mark(self, text, page):
        "Put a target at every tagged equation and every theorem in bold or in a heading; the first page to state it owns it."
        return rewrite(text, display=lambda piece: self.mark_equation(piece, page), heading=self.mark_heading, prose=lambda prose: BOLD.sub(self.mark_bold, prose))

    def mark_equation(self, piece, page):
        for number in re.findall(r'\\tag\{(\w+)\}', piece)[:1]:
            label = f'eq-{number}' if number not in self.equations else f'eq-{number}-{page.replace("/", "-")}'
            self.equations.setdefault(number, {})[page] = label
            return f'\n\n({label})=\n{piece}\n\n'
        return piece

    def new_statement(self, name):
        "A label for a theorem that has none yet."
        if name in self.statements: return ''
        return self.statements.setdefault(name, name.lower().replace(' ', '-'))

    def mark_heading(self, piece):
        labels = [self.new_statement(f'{match[1]} {match[2]}') for match in STATEMENT.finditer(piece)]
        return ''.join(f'({label})=\n' for label in labels if label) + piece

    def mark_bold(self, match):
        label = self.new_statement(' '.join(match[1].split()))
        return f'[{match[0]}]{{#{label}}}' if label else match[0]

    def equation(self, number, page):
        pages = self.equations.get(number, {})
        return pages.get(page) or next(iter(pages.values()), None)

    def link(self, prose, page):
        def equation(match):
            label = self.equation(match[1], page)
            return f'[({match[1]})](#{label})' if label else match[0]

        def statement(match):
            label = self.statements.get(f'{match[1]} {match[2]}')
            return f'[{match[0]}](#{label})' if label else match[0]

        def table(match):
            number = re.search(r'\d', match[0])[0]
            if len(re.findall(r'\d', match[0])) == 1 and number in self.tables: return f'[{match[0]}]({self.tables[number]})'
            return re.sub(r'\d', lambda m: f'[{m[0]}]({self.tables[m[0]]})' if m[0] in self.tables else m[0], match[0])

        prose = re.sub(r'(?<![\w\]])\((\d{1,3})\)', equation, prose)
        return TABLES.sub(table, STATEMENT.sub(statement, prose))


class Files:
    "Relative links of a notebook -> pages of the site, files copied next to it, or the repository's address."

    def __init__(self, root, pages, repository, copy):
        self.root, self.pages, self.repository, self.copy, self.broken = root, pages, repository, copy, []

    def parts(self, piece, source):
        "(text, target, repository path or '', anchor) of one `[text](target)`, seen from the repository path `source`."
        text, target = re.fullmatch(r'(!?\[.*\])\(<?([^)>\s]*)>?[^)]*\)', piece, re.S).groups()
        path, _, anchor = target.partition('#')
        outside = re.match(r'[a-z]+:', target) or not path
        return text, target, '' if outside else os.path.normpath((Path(source).parent / path).as_posix()), anchor

    def exists(self, piece, source):
        path = self.parts(piece, source)[2]
        return not path or path in self.pages or (self.root / path).exists()

    def link(self, piece, source):
        "One link, seen from `source`."
        text, target, path, anchor = self.parts(piece, source)
        if not path: return f'{text}({slug(target)})' if target.startswith('#') else piece
        return f'{text}({self.address(path, source, target)}{slug("#" + anchor) if anchor else ""})'

    def address(self, path, source, target):
        if path in self.pages: return '/' + self.pages[path]
        full = self.root / path
        if not full.exists(): self.broken.append(f'{source}: {target}')
        elif path.startswith('results/') and full.is_file() or full.suffix in ('.png', '.svg'): return self.copy(path)
        return f'{self.repository}/{"tree" if full.is_dir() else "blob"}/main/{path}'


def slug(anchor):
    "Jupyter's `#The-Gaussian-radius` as the anchor that MyST gives the heading."
    return re.sub(r'[^\w#-]', '', anchor).lower()


def plain(text):
    "Markdown as one line of plain words, for alternative texts."
    text = re.sub(r'\{[\w:.-]+\}`([^`<]+?)(?: <[^`]*>)?`', r'\1', text)
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
    return re.sub(r'\s+', ' ', re.sub(r'[`*$#>]|\\(?=[a-zA-Z]+)', '', text)).strip()


def last_sentence(text):
    "What the prose says just before a figure: its last paragraph's last sentence."
    paragraphs = [p for p in re.split(r'\n\s*\n', text.strip()) if p.strip() and not p.startswith(('#', '|', '```', '$$'))]
    if not paragraphs: return ''
    sentence = re.split(r'(?<=[.!?])\s+(?=[A-Z`$\[])', paragraphs[-1].strip())[-1]
    return re.sub(r'[:;,]$', '.', plain(sentence))
