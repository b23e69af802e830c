"Packaging metadata; every value comes from settings.ini."
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

setup(
    name=ini['lib_name'], version=ini['version'], description=ini['description'],
    author=ini['author'], author_email=ini['author_email'], license='Apache-2.0', keywords=ini['keywords'],
    url=ini['git_url'], python_requires='>=' + ini['min_python'],
    packages=find_packages(include=[ini['lib_path'] + '*']), package_data={ini['lib_path']: ['*.csv']},
    install_requires=split(ini['requirements']), extras_require=extras,
    long_description=(root / 'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points={'console_scripts': split(ini['console_scripts']),
                  'nbdev': [f"{ini['lib_path']}={ini['lib_path']}._modidx:d"]},
)
