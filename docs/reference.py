"Reference pages from the modules' source alone: signatures, one comment per argument, errors, where it is explained, code."
import ast
import inspect
import io
import re
import textwrap
import tokenize
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path


@dataclass
class Argument:
    name: str  # with its stars
    annotation: str = ''
    default: str = ''
    comment: str = ''

    def __str__(self):
        text = self.name + (f': {self.annotation}' if self.annotation else '')
        equals = ' = ' if self.annotation else '='
        return text + (equals + self.default if self.default else '')


@dataclass
class Member:
    kind: str  # 'function', 'method', 'property', 'class', 'data' or 'attribute'
    name: str
    doc: str = ''
    arguments: list = field(default_factory=list)
    returns: Argument | None = None
    errors: list = field(default_factory=list)
    code: str = ''
    members: list = field(default_factory=list)
    sections: dict = field(default_factory=dict)  # 'Attributes' and 'Examples' of a class


@cache
def imported_from_the_top(folder):
    "(name, module) of what `from rab_nb import ...` offers."
    tree = ast.parse((folder / '__init__.py').read_text()) if (folder / '__init__.py').exists() else ast.parse('')
    rooms = [node.value for node in tree.body if isinstance(node, ast.Assign) and unparse(node.targets[0]) == '_ROOMS']
    return [(word.arg, ast.literal_eval(word.value)) for call in rooms for word in call.keywords]


def split_sections(doc):
    "A docstring in NumPy's style -> its text, and what stands under each underlined title."
    text, *rest = re.split(r'^(\w+)\n-{3,}\n', doc, flags=re.M)
    return text.strip(), {title: body.strip() for title, body in zip(rest[::2], rest[1::2])}


def described(section):
    "Lines `name, other : text` -> text by name."
    found = {}
    for line in section.split('\n'):
        names, colon, text = line.partition(' : ')
        if colon and not line.startswith(' '): found |= {name.strip(): text for name in names.split(',')}
    return found


def comments_by_line(source):
    "Line number -> what its comment says; a line that is only a comment continues the one above."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip('# ').rstrip()
            alone = not token.line[:token.start[1]].strip()
            found[line] = f'{found.get(line - 1, "")} {text}'.strip() if alone else text
            if alone and line - 1 in found: found[line - 1] = found[line]
    return found


def unparse(node):
    return '' if node is None else ast.unparse(node)


def patched(node):
    "Name of the class that a function becomes a method of: `@patch def f(self: Class)`; '' without `patch`."
    marks = {unparse(mark) for mark in node.decorator_list}
    return unparse(node.args.args[0].annotation) if 'patch' in marks else ''


def annotation(node):
    "A type, without the quotes of a forward reference."
    return re.sub(r"'([\w.]+)'", r'\1', unparse(node))


# what a reader comes for besides the names of `from rab_nb import ...`: first among the classes and functions of its page
MAIN = dict(theory='gaussian_radius relabelled_radius joint_norm uniform_certifies uniform_linf_radius robustness_condition',
            bounds='hoeffding empirical_bernstein betting clopper_pearson', certificate='Certificate certify', noise='generator',
            defences='compare_defences PartitionClassifier BaggedClassifier PlainKNNClassifier', data='load', inputs='dataset_arrays',
            dp='epsilon')
METHODS = ['fit', 'predict', 'predict_proba', 'certify']  # of a classifier, first


class Module:
    "One exported module: its public names as `Member`s. `others`: all modules by name, for what a class inherits from one of them."

    def __init__(self, path, others=None):
        self.others = {} if others is None else others
        self.name, self.folder, self.source = path.stem, path.parent, path.read_text()
        self.lines, self.tree = self.source.split('\n'), ast.parse(self.source)
        self.comments = comments_by_line(self.source)
        named = [node for node in self.tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        self.nodes = {node.name: node for node in named if not patched(node)}
        self.patches = [node for node in named if patched(node)]

    @property
    def doc(self): return ast.get_docstring(self.tree) or ''

    @cached_property
    def public(self):
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and unparse(node.targets[0]) == '__all__': return ast.literal_eval(node.value)
        return []

    @cached_property
    def members(self):
        "Classes, functions, constants; among each of them what users import comes first, then the order of the notebook."
        first = MAIN.get(self.name, '').split()
        first += [name for name, home in imported_from_the_top(self.folder) if home == self.name and name not in first]

        def place(name):
            node = self.nodes.get(name)
            kind = [ast.ClassDef, ast.FunctionDef, type(None)].index(type(node))
            return (kind, 0, first.index(name)) if name in first else (kind, 1, getattr(node, 'lineno', 0))
        return [self.member(name) for name in sorted(self.public, key=place)]

    def member(self, name):
        node = self.nodes.get(name)
        if isinstance(node, ast.ClassDef): return self.class_member(node)
        if node is not None: return self.function_member(node, 'function')
        return self.constant(name)

    def constant(self, name):
        for node in self.tree.body:
            names = [unparse(target) for target in getattr(node, 'targets', [getattr(node, 'target', None)]) if target]
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and any(name in re.split(r'\W+', text) for text in names):
                return Member('data', name, self.comments.get(node.end_lineno, ''), code=self.code(node))
        raise ValueError(f'{name} is in __all__ of rab_nb.{self.name} but not defined there')

    def code(self, node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', []))])
        return textwrap.dedent('\n'.join(self.lines[first - 1:node.end_lineno]))

    def comment(self, node): return self.comments.get(node.end_lineno, '')

    def function_member(self, node, kind):
        decorators = {unparse(d) for d in node.decorator_list}
        if kind == 'method' and decorators & {'property', 'cached_property'}: kind = 'property'
        arguments = self.arguments(node.args)
        if kind != 'function' and 'staticmethod' not in decorators: arguments = arguments[1:]
        closing = node.body[0].lineno - 1 if node.body[0].lineno > node.lineno else node.lineno
        said = self.comments.get(closing, '')
        alone = closing not in {arg.end_lineno for arg in all_arguments(node.args)}
        back = Argument('', annotation(node.returns), comment=said if alone or node.returns else '')
        if back.comment and not alone: arguments = [a if a.comment != said else Argument(a.name, a.annotation, a.default) for a in arguments]
        return Member(kind, node.name, ast.get_docstring(node) or '', arguments, back, self.errors(node), self.code(node))

    def arguments(self, args):
        plain = args.posonlyargs + args.args
        defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
        make = lambda arg, default=None, star='': Argument(star + arg.arg, annotation(arg.annotation), unparse(default), self.comment(default or arg))
        out = [make(arg, default) for arg, default in zip(plain, defaults)]
        if args.vararg: out.append(make(args.vararg, star='*'))
        elif args.kwonlyargs: out.append(Argument('*'))
        out += [make(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults)]
        return out + ([make(args.kwarg, star='**')] if args.kwarg else [])

    def lineage(self, node):
        "The class and what it inherits from in this package, the nearest first: (module, node)."
        found = [(self, node)]
        for base in map(unparse, node.bases):
            homes = [module for module in [self, *self.others.values()] if base in module.nodes]
            if homes: found += homes[0].lineage(homes[0].nodes[base])
        return found

    def methods(self, node):
        own = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        return own + [item for item in self.patches if patched(item) == node.name]

    def added_doc(self, name):
        "What `name.__doc__ += ...` adds."
        added = [item.value for item in self.tree.body if isinstance(item, ast.AugAssign) and unparse(item.target) == f'{name}.__doc__']
        return ''.join(map(self.text, added))

    def text(self, node):
        "The value of a sum of texts and of the module's own constants."
        if isinstance(node, ast.BinOp): return self.text(node.left) + self.text(node.right)
        constants = {unparse(item.targets[0]): item.value for item in self.tree.body if isinstance(item, ast.Assign)}
        return ast.literal_eval(constants[node.id] if isinstance(node, ast.Name) else node)

    def class_member(self, node):
        lineage = self.lineage(node)
        start = [(module, item) for module, cls in lineage for item in module.methods(cls) if item.name == '__init__']
        fixed = [Member('attribute', unparse(item.targets[0]), self.comment(item), code=unparse(item.value)) for item in node.body
                 if isinstance(item, ast.Assign) and not unparse(item.targets[0]).startswith('_')]
        methods = {}
        for module, cls in lineage:
            for item in module.methods(cls):
                if not item.name.startswith('_'): methods.setdefault(item.name, module.function_member(item, 'method'))
        chosen = [methods.pop(name) for name in METHODS if name in methods]
        arguments = start[0][0].arguments(start[0][1].args)[1:] if start else self.fields(node)
        raw = (ast.get_docstring(node, clean=False) or '') + self.added_doc(node.name)
        doc, sections = split_sections(inspect.cleandoc(raw))
        said = described(sections.pop('Parameters', ''))
        for argument in arguments: argument.comment = argument.comment or said.get(argument.name, '')
        return Member('class', node.name, doc, arguments, None, self.errors(node), self.code(node),
                      fixed + chosen + list(methods.values()), sections)

    def fields(self, node):
        "A dataclass's fields, those it inherits first."
        inherited = [self.nodes[unparse(base)] for base in node.bases if unparse(base) in self.nodes]
        out = {argument.name: argument for base in inherited for argument in self.fields(base)}
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and 'init=False' not in unparse(item.value):
                out[item.target.id] = Argument(item.target.id, annotation(item.annotation), unparse(item.value), self.comment(item))
        return list(out.values())

    def errors(self, node, seen=None):
        "(exception, message) of every `raise` in the function and in the functions of this module that it calls."
        seen, out = set() if seen is None else seen, []
        start = [item for item in getattr(node, 'body', []) if getattr(item, 'name', '') in ('__init__', '__post_init__')]
        for item in (inner for part in (start if isinstance(node, ast.ClassDef) else [node]) for inner in ast.walk(part)):
            if isinstance(item, ast.Raise) and isinstance(item.exc, ast.Call) and item.exc.args:
                out.append((unparse(item.exc.func), message(item.exc.args[0])))
            name = item.func.id if isinstance(item, ast.Call) and isinstance(item.func, ast.Name) else ''
            if name in self.nodes and name not in seen:
                seen.add(name)
                out += self.errors(self.nodes[name], seen)
        return list(dict.fromkeys(error for error in out if error[1]))


def all_arguments(args):
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [args.vararg, args.kwarg])]


def message(node):
    "The text of an error message; what is filled in when it is raised shows as an ellipsis."
    if isinstance(node, ast.Constant): return str(node.value)
    if isinstance(node, ast.FormattedValue): return '…'
    if isinstance(node, ast.JoinedStr): return ''.join(map(message, node.values))
    if isinstance(node, ast.BinOp): return message(node.left) + message(node.right)
    return ''


def escape(text):
    "Markdown that shows `text` as it is, apart from what stands in backticks."
    parts = re.split(r'(`[^`]+`)', text)
    return ''.join(part if part.startswith('`') else re.sub(r'([\\*_<>$\[\]|~^#])', r'\\\1', part) for part in parts)


def fenced(text, info, depth=3):
    fence = '`' * max(depth, *(len(run) + 1 for run in re.findall('`+', text) or ['']))
    return f'{fence}{info}\n{text}\n{fence}'


def fields(member, link):
    lines = [f':param {a.name.lstrip("*")}: {link(escape(a.comment))}' for a in member.arguments if a.comment]
    if member.returns and member.returns.comment: lines.append(f':returns: {link(escape(member.returns.comment))}')
    lines += [f':raises {kind}: {escape(text)}' for kind, text in member.errors]
    return '\n'.join(lines)


def attribute_lines(member):
    "(names in code type, what they hold) of a class's attributes, without those that are arguments and described as such."
    arguments = {argument.name for argument in member.arguments}
    for line in member.sections.get('Attributes', '').split('\n'):
        names, _, text = line.partition(' : ')
        left = [name.strip() for name in names.split(',') if name.strip() not in arguments]
        if text and left: yield ', '.join(f'`{name}`' for name in left), text


def entry(member, module, link, explained, owner=''):
    "One name as a directive of Sphinx's Python domain."
    call = member.kind not in ('data', 'attribute', 'property')
    signature = member.name + (f'({", ".join(map(str, member.arguments))})' if call else '')
    if member.returns and member.returns.annotation and call: signature += f' -> {member.returns.annotation}'
    options = [f':module: rab_nb.{module}']
    if member.kind == 'property' and member.returns.annotation: options.append(f':type: {member.returns.annotation}')
    if member.kind == 'attribute': options.append(f':value: {member.code}')
    parts = ['\n'.join(options), link(escape(member.doc)), fields(member, link)]
    if attributes := list(attribute_lines(member)):
        parts.append('**Attributes**\n\n' + '\n'.join(f'- {names}: {link(escape(text))}' for names, text in attributes))
    if example := member.sections.get('Examples'): parts.append('**Example**\n\n' + fenced(example, 'python'))
    parts += [entry(inner, module, link, '', member.name) for inner in member.members]
    if not owner:
        parts += [f'{{.explained}}\n{explained}' if explained else '', source(member)]
    return fenced('\n\n'.join(filter(None, parts)), f'{{py:{member.kind}}} {signature}')


def source(member):
    code = fenced(member.code, 'python')
    return fenced(code, '{dropdown} Source\n:class-container: source\n', 4)


def page(module, link, explained):
    "MyST text of one module's page; `explained(name)` gives a sentence that links to the notebook."
    head = [f'# rab_nb.{module.name}', f'{{.lead}}\n{link(escape(module.doc))}', f'```{{py:module}} rab_nb.{module.name}\n```']
    return '\n\n'.join(head + [entry(member, module.name, link, explained(member.name)) for member in module.members]) + '\n'


def load(folder):
    "Every exported module that has public names, by name."
    found = {}
    found |= {path.stem: Module(path, found) for path in sorted(Path(folder).glob('[a-z]*.py'))}
    return {name: module for name, module in found.items() if module.public}
