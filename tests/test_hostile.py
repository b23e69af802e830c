"""Files and names that somebody else wrote: 2,000 mutated certificates and 500 mutated profiles give values
or clean errors, and the report shows names as text. (The same for 2,000 run-store files is in test_runs.py,
for 3,000 data files in test_data.py.)"""
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from rab_nb import report, tables
from rab_nb.certificate import Certificate, certify
from rab_nb.noise import GaussianNoise

BITS = [b',', b'\n', b'"', b'nan', b'inf', b'1e999', b'-1', b'', b'\xff', b'\x00', b'__import__("os")',
        b'GaussianNoise(sigma=0)', b'9' * 400, b'{"d": 1}', b'True', b'=1+1']


def mutated(content, rng):
    """Overwrite, cut, insert, swap fields or repeat a line: what editors, spreadsheets and enemies do to a
    text file."""
    b = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        i, j = sorted(int(k) for k in rng.integers(0, len(b) + 1, 2))
        bit, kind = BITS[rng.integers(len(BITS))], rng.integers(6)
        if kind == 0 and b:
            b[i % len(b)] = int(rng.integers(256))
        elif kind == 1:
            del b[i:min(j, i + int(rng.integers(1, 60)))]
        elif kind == 2:
            b[i:i] = bit
        elif kind == 3:
            fields = bytes(b).split(b',')
            fields[rng.integers(len(fields))] = bit
            b = bytearray(b','.join(fields))
        elif kind == 4:
            lines = bytes(b).split(b'\n')
            lines.insert(int(rng.integers(len(lines))), lines[rng.integers(len(lines))])
            b = bytearray(b'\n'.join(lines))
        else:
            del b[j:]
    return bytes(b)


@pytest.mark.filterwarnings('ignore')
def test_two_thousand_certificates(tmp_path):
    "A certificate with sound columns and a claim that its noise supports, or ValueError."
    rng, refused, path = np.random.default_rng(0), 0, tmp_path / 'certificate.csv'
    certify(rng.dirichlet([3, 1], (60, 5)), GaussianNoise(1.)).to_csv(path)
    content = path.read_bytes()
    for _ in range(2000):
        path.write_bytes(mutated(content, rng))
        try:
            cert = Certificate.from_csv(path)
        except ValueError:
            refused += 1
        else:
            assert cert.prediction.dtype == np.int64 and (cert.prediction >= -1).all()
            assert len(cert.prediction) == len(cert.radius) == len(cert.p_a) == len(cert.p_b)
            assert all(((p >= 0) & (p <= 1)).all() for p in (cert.p_a, cert.p_b))
            assert (cert.radius >= 0).all()
            assert not ((cert.radius > 0) & ((cert.prediction < 0) | (cert.p_a <= cert.p_b))).any()
            cert.to_frame(), cert.covers(1, .1)
    assert 1000 < refused < 2000


def replaced(tree, rng):
    "The profile with one value, somewhere, of another type or size."
    values = [None, -1, 1e400, '', 'x' * 10_000, [], {}, [[]], True, float('nan'), {'a': {'b': []}},
              '../../etc/passwd', '__import__("os").system("true")', [1] * 1000]
    places = [(tree, key) for key in tree]
    for holder, key in places:
        inner = holder[key]
        if isinstance(inner, (dict, list)):
            places += [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))]
    holder, key = places[rng.integers(len(places))]
    if rng.random() < .2 and isinstance(holder, dict):
        holder[str(values[rng.integers(len(values))])[:50]] = holder.pop(key)
    else:
        holder[key] = values[rng.integers(len(values))]
    return tree


def test_five_hundred_profiles(tmp_path):
    "A profile from which every table's rows follow, or ValueError."
    good, path = (tables.PROFILES / 'quick.yaml').read_text(), tmp_path / 'profile.yaml'
    rng, refused = np.random.default_rng(0), 0
    load = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    for _ in range(500):
        path.write_text(yaml.safe_dump(replaced(yaml.load(good, load), rng)))
        try:
            profile = tables.load_profile(path)
        except ValueError:
            refused += 1
        else:
            assert set(tables.REQUIRED) < set(profile)
    assert 50 < refused < 500


def test_a_profile_that_explodes_is_refused(tmp_path):
    "A few hundred bytes of aliases that stand for a billion strings."
    aliases = [f'{n}: &{n} [{", ".join(["*" + m] * 9)}]' for m, n in zip('abcdefgh', 'bcdefghi')]
    bomb = '\n'.join(['a: &a [x, x, x, x, x, x, x, x, x]', *aliases, ''])
    (tmp_path / 'bomb.yaml').write_text(bomb)
    with pytest.raises(ValueError):
        tables.load_profile(tmp_path / 'bomb.yaml')


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}


def test_report_shows_names_as_text(tmp_path):
    "A result whose every text tries to become markup."
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    folder = tmp_path / 'paper'
    folder.mkdir()
    source = min((tables.ROOT / 'results').glob('*/table9.json'), default=None)
    if source is None:
        pytest.skip('no table has been run yet: make tables')
    def spoilt(value):
        if isinstance(value, str): return value + evil
        return [spoilt(v) for v in value] if isinstance(value, list) else value
    page = json.loads(source.read_text())
    page = {key: value if key in ('number', 'profile') else spoilt(value)
            for key, value in page.items()} | {'profile': 'paper'}
    (folder / 'table9.json').write_text(json.dumps(page))
    (folder / 'table9.png').write_bytes(source.with_suffix('.png').read_bytes())
    text = report.report(tmp_path).read_text()
    assert 'alert(1)' in text and '<script' not in text
    found = Tags(text)
    assert not found.tags & {'script', 'iframe', 'object', 'form'}
    assert not {name for name in found.attributes if name.startswith('on')}
