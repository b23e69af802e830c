"Packaging metadata; every value comes from settings.ini."
import re
from configparser import ConfigParser
from pathlib import Path
from shlex import split
from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(root / 'settings.ini', encoding='utf-8')
ini = parser['DEFAULT']
extras = {key.removesuffix('_requirements'): split(ini[key]) for key in ini if key.endswith('_requirements')}
extras['dev'] = [name for names in extras.values() for name in names]

PROFILES = f"{ini['lib_path']}._profiles"  # what `rab-nb run --profile` finds outside of a clone
CLASSIFIERS = [
    'Development Status :: 4 - Beta',
    'Intended Audience :: Science/Research',
    'License :: OSI Approved :: Apache Software License',
    'Programming Language :: Python :: 3 :: Only',
    *(f'Programming Language :: Python :: 3.{minor}' for minor in (11, 12, 13)),
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Topic :: Security',
    'Typing :: Typed',
]
project_urls = {
    'Documentation': ini['doc_host'] + ini['doc_baseurl'],
    'Source': ini['git_url'],
    'Changelog': f"{ini['git_url']}/blob/{ini['branch']}/CHANGELOG.md",
    'Paper': 'https://arxiv.org/abs/2003.08904v1',
}


def absolute_links(text):
    "README's links and images seen from a package index, where its neighbours are absent."
    base, raw = f"{ini['git_url']}/blob/{ini['branch']}/", f"{ini['git_url']}/raw/{ini['branch']}/"
    text = re.sub(r'(!\[[^\]]*\]\()(?![a-z]+:|#)', rf'\g<1>{raw}', text)
    return re.sub(r'((?<!!)\[[^\]]*\]\()(?![a-z]+:|#)', rf'\g<1>{base}', text)


TEX = {r'\sqrt{\sum_i\lVert\pi_i\rVert_2^2}': '√(Σᵢ ‖πᵢ‖²)', r'\alpha': 'α', r'\sigma': 'σ', r'\pi_i': 'πᵢ'}


def plain_formulas(text):
    "README's formulas in characters: an index page does not typeset TeX."
    def plain(match):
        formula = match[1]
        for tex, characters in TEX.items(): formula = formula.replace(tex, characters)
        return formula
    return re.sub(r'(?<![\\$])\$([^$\n]+)\$', plain, text)


setup(
    name=ini['lib_name'], version=ini['version'], description=ini['description'],
    author=ini['author'], author_email=ini['author_email'], license='Apache-2.0', keywords=ini['keywords'],
    url=ini['git_url'], python_requires='>=' + ini['min_python'],
    classifiers=CLASSIFIERS, project_urls=project_urls,
    packages=[*find_packages(include=[ini['lib_path'] + '*']), PROFILES],
    package_dir={PROFILES: 'nbs/experiments/profiles'},
    package_data={ini['lib_path']: ['*.csv', 'py.typed'], PROFILES: ['*.yaml']},
    install_requires=split(ini['requirements']), extras_require=extras,
    long_description=plain_formulas(absolute_links((root / 'README.md').read_text(encoding='utf-8'))),
    long_description_content_type='text/markdown',
    entry_points={'console_scripts': split(ini['console_scripts']),
                  'nbdev': [f"{ini['lib_path']}={ini['lib_path']}._modidx:d"]},
)
