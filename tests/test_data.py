"Files that are hostile or damaged, the real data sets, and every way into `load`."
import io
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy

from rab_nb import data

REAL = os.environ.get('RAB_DATA', '')
real = pytest.mark.skipif(not REAL, reason='RAB_DATA is not set')


def npz(path, **members):
    "An archive whose members are given as bytes."
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(f'{name}.npy', content)
    return path


def promise(shape, descr='|u1', payload=b'', fortran=False):
    "The bytes of an array file with the given header, whatever follows."
    f = io.BytesIO()
    npy.write_array_header_1_0(f, dict(shape=shape, fortran_order=fortran, descr=descr))
    return f.getvalue() + payload


@pytest.fixture
def good(tmp_path):
    path = tmp_path/'good.npz'
    np.savez_compressed(path, x_train=np.arange(40, dtype='f4').reshape(10, 4), y_train=np.arange(10) % 2,
                        x_test=np.ones((4, 4)), y_test=np.array([0, 1, 0, 1]), names=np.array(['a', 'bc']))
    return path


@pytest.fixture
def alone(tmp_path, monkeypatch):
    "No data anywhere: another working directory and no RAB_DATA."
    monkeypatch.delenv('RAB_DATA', raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_round_trip(good):
    with np.load(good) as expected:
        found = data.read_npz(good)
        assert list(found) == list(expected)
        for k in found:
            np.testing.assert_array_equal(found[k], expected[k])
    found.pop('names')
    assert data.from_arrays(**found).x_train.dtype == np.float32


def test_fortran_order_and_version_2(tmp_path):
    a, f = np.asfortranarray(np.arange(6.).reshape(2, 3)), io.BytesIO()
    npy.write_array(f, a, version=(2, 0))
    np.testing.assert_array_equal(data.read_npz(npz(tmp_path/'f.npz', a=f.getvalue()))['a'], a)


@pytest.mark.parametrize('shape, descr',
                         [((2**62,), '|u1'), ((2**40, 2**40), '<f8'), ((10**9, 10**9, 10**9), '<f4'),
                          ((1,), '<U500000000000'), ((2**34,), '<f8')])
def test_absurd_shape_is_refused(tmp_path, shape, descr):
    with pytest.raises(ValueError, match='promises|not a usable'):
        data.read_npz(npz(tmp_path/'a.npz', x=promise(shape, descr)))


@pytest.mark.parametrize('content, message', [
    (promise((-1,)), 'promises'), (promise((10,), payload=b'123'), 'archive holds 3'),
    (promise((2,), payload=b'12345'), 'archive holds 5'),
    (promise((1,), '|O', b'cos\nsystem\n(S"true"\ntR.'), 'not allowed'),
    (promise((1,), [('a', '<i4'), ('b', '|O')]), 'not allowed'),
    (promise((1,), '|V8', b'12345678'), 'not allowed'), (promise((1,), '<c16', b'0' * 16), 'not allowed'),
    (promise((1,), '<M8[s]', b'0' * 8), 'not allowed'),
    (b'', 'not a usable npz'), (b'\x93NUMPY\x09\x00', 'not a usable npz'),
    (b'\x80\x04K\x01.', 'not a usable npz')])
def test_bad_member_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as e:
        data.read_npz(npz(tmp_path/'bad.npz', x=content))
    assert 'bad.npz' in str(e.value)


def test_pickle_never_runs(tmp_path):
    class Bomb:
        def __reduce__(self): return (Path.touch, (tmp_path/'ran',))
    np.savez(tmp_path/'bomb.npz', x=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match='type object is not allowed'):
        data.read_npz(tmp_path/'bomb.npz')
    assert not (tmp_path/'ran').exists()


def test_forged_directory(tmp_path):
    "The archive's directory agrees with an absurd header: the ratio or the limit gives it away."
    path = npz(tmp_path/'forged.npz', x=promise((2**30,)))
    raw, size = path.read_bytes(), len(promise((2**30,)))
    forged = raw.replace(size.to_bytes(4, 'little'), (size + 2**30).to_bytes(4, 'little'))
    assert forged != raw
    path.write_bytes(forged)
    with pytest.raises(ValueError, match='bomb|promises'):
        data.read_npz(path, limit=2**32)
    with pytest.raises(ValueError, match='promises'):
        data.read_npz(path, limit=2**20)


def test_limit_holds_for_the_sum(tmp_path):
    np.savez_compressed(tmp_path/'many.npz', **{f'x{i}': np.zeros(1000, 'u1') for i in range(20)})
    assert len(data.read_npz(tmp_path/'many.npz', limit=20_000)) == 20
    with pytest.raises(ValueError, match='promises'):
        data.read_npz(tmp_path/'many.npz', limit=19_999)


def test_too_many_members(tmp_path):
    np.savez(tmp_path/'many.npz', **{f'x{i}': np.zeros(1) for i in range(65)})
    with pytest.raises(ValueError, match='65 arrays'):
        data.read_npz(tmp_path/'many.npz')


def test_nothing_is_allocated(tmp_path):
    "A child that may use little memory refuses 16 bombs, each 64 MiB of zeros in 64 KiB."
    content = promise((2**26,), payload=bytes(2**26))
    path = npz(tmp_path/'zeros.npz', x=content)
    assert path.stat().st_size < 2**17
    code = f'''
import resource
from rab_nb import data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(16):
    try: data.read_npz({str(path)!r}, limit=2**25)
    except ValueError as e: assert "promises" in str(e)
    else: raise SystemExit("not refused")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16_000 # KiB


def mutate(raw: bytes, r) -> bytes:
    "One of: flip bits, overwrite, cut, insert, duplicate a stretch, swap two stretches."
    b, kind = bytearray(raw), r.integers(6)
    i, j = sorted(r.integers(0, len(b), 2))
    if kind == 0:
        for k in r.integers(0, len(b), r.integers(1, 9)):
            b[k] ^= 1 << r.integers(8)
    elif kind == 1:
        b[i:i + 8] = r.bytes(8)
    elif kind == 2:
        del b[i:j]
    elif kind == 3:
        b[i:i] = r.bytes(int(r.integers(1, 40)))
    elif kind == 4:
        b[j:j] = b[i:i + 200]
    else:
        b[i:i + 4], b[j:j + 4] = b[j:j + 4], b[i:i + 4]
    return bytes(b)


@pytest.mark.parametrize('compressed', [True, False])
def test_fuzz(good, tmp_path, compressed):
    "1,000 damaged archives each way: an error that names the file, or arrays of numbers."
    if not compressed:
        with np.load(good) as d:
            np.savez(good, **d)
    raw, r, refused = good.read_bytes(), np.random.default_rng(0), 0
    for _ in range(1000):
        good.write_bytes(mutate(raw, r))
        try:
            found = data.read_npz(good)
        except ValueError as e:
            refused += 1
            assert good.name in str(e)
        else:
            assert all(a.dtype.kind in 'biufU' for a in found.values())
    assert refused > 500


@pytest.mark.filterwarnings('ignore')
def test_fuzz_headers(tmp_path):
    "Damage in the array headers alone, under checksums that fit."
    raw, r = promise((3, 4), '<f4', bytes(48)), np.random.default_rng(1)
    for _ in range(1000):
        b = bytearray(raw)
        for k in r.integers(0, 128, r.integers(1, 6)):
            b[k] = r.integers(256)
        try:
            found = data.read_npz(npz(tmp_path/'h.npz', x=bytes(b)))
        except ValueError as e:
            assert 'h.npz' in str(e)
        else:
            assert found['x'].nbytes <= 60


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(ValueError, match='no such file'):
        data.read_npz(tmp_path/'none.npz')
    with pytest.raises(ValueError, match='no such file'):
        data.read_npz(tmp_path)


def test_wrong_checksum_names_file_and_sums(alone):
    (alone/'spambase.npz').write_bytes(b'x')
    with pytest.raises(ValueError) as e:
        data.load('spambase', root=alone)
    for part in (str(alone/'spambase.npz'), data.SHA256['spambase.npz'],
                 data._checksum(alone/'spambase.npz')):
        assert part in str(e.value)


@pytest.mark.parametrize('name', ['mnist', 'cifar10', 'imagenet', 'spambase'])
def test_nothing_found(alone, name):
    with pytest.raises(ValueError, match='set RAB_DATA'):
        data.load(name, download=False)
    assert not list(alone.rglob('*.npz'))


def test_search_order(tmp_path, monkeypatch):
    (tmp_path/'repo/inner').mkdir(parents=True)
    (tmp_path/'repo/settings.ini').touch()
    monkeypatch.chdir(tmp_path/'repo/inner')
    monkeypatch.setenv('RAB_DATA', str(tmp_path/'env'))
    assert data.folders(tmp_path/'root') == [tmp_path/'root', tmp_path/'env', tmp_path/'repo/data']
    assert data.folders() == [tmp_path/'env', tmp_path/'repo/data']


@pytest.mark.parametrize('change, message', [
    (dict(x_train=[[0, np.inf], [0, 1]]), 'NaN or infinity in 1 of 2 rows, the first is row 0'),
    (dict(x_train=[[1e300, 0], [0, 1]]), 'NaN or infinity'),
    (dict(x_test=[[np.nan, 1]]), 'x_test'), (dict(y_train=[0]), '1 labels for 2 inputs'),
    (dict(x_test=[[1, 2, 3]]), 'x_test rows'),
    (dict(y_test=[2]), 'no training rows of class 2'),
    (dict(classes=(0, 1, 2)), 'no training rows of class 2'), (dict(classes=(0, 1, 1)), 'distinct'),
    (dict(classes=(0, 0)), 'not among'),
    (dict(x_train=[[1, 2], [3]]), 'equal rows'), (dict(x_train=[['a', 'b'], ['c', 'd']]), 'real numbers'),
    (dict(x_train=np.ones((2, 2)) * 1j), 'real numbers'),
    (dict(x_train=np.zeros((0, 2)), y_train=[]), 'two or more'), (dict(value_range=(0, .5)), 'value_range'),
    (dict(y_train=[[0], [1]]), 'y_train'),
    (dict(x_train=[0, 1], x_test=[0]), r'\(n, ...\)'), (dict(x_train=[[None, 1], [0, 1]]), 'x_train')])
def test_from_arrays_refuses(change, message):
    ok = dict(x_train=[[0, 1], [1, 0]], y_train=[0, 1], x_test=[[1, 1]], y_test=[1])
    assert data.from_arrays(**ok).classes == (0, 1)
    with pytest.raises(ValueError, match=message), np.errstate(over='ignore'):
        data.from_arrays(**ok | change)


def test_task_is_a_snapshot():
    x, y = np.zeros((4, 3)), np.array([0, 1, 0, 1])
    task = data.from_arrays(x, y, x, y)
    x += 1
    y += 5
    assert task.x_train.max() == 0 and task.y_train.max() == 1
    for a in (task.x_train, task.y_train, task.x_test, task.y_test):
        with pytest.raises(ValueError, match='read-only'):
            a[:1] = 0


def test_classes_decide_the_labels():
    task = data.from_arrays([[0], [1], [2]], ['b', 'a', 'b'], [[0]], ['a'], classes=('b', 'a'))
    assert task.y_train.tolist() == [0, 1, 0] and task.y_test.tolist() == [1]
    assert data.from_arrays([[0], [1]], [True, False], [[0]], [True]).classes == (False, True)


@pytest.mark.parametrize('name', ['digits', 'photos', 'breast_cancer'])
def test_bundled(name, alone):
    task, again = data.load(name), data.load(name, random_state=7)
    assert task.stand_in_for and task.source and len(task.sha256) == 64
    assert data.digest(task.x_train) != data.digest(again.x_train)
    twin = data.load(name)
    assert data.digest(task.x_train, task.y_test) == data.digest(twin.x_train, twin.y_test)
    shared = {x.tobytes() for x in task.x_train} & {x.tobytes() for x in task.x_test}
    assert not shared
    assert not list(alone.iterdir())


def test_reversed_pair_keeps_rows():
    a, b = data.load('digits', (8, 6)), data.load('digits', (6, 8))
    np.testing.assert_array_equal(a.x_train, b.x_train)
    np.testing.assert_array_equal(a.y_train, 1 - b.y_train)


def test_photo_patches_do_not_share_pixels():
    where = np.arange(427 * 640 * 3).reshape(427, 640, 3)
    train, test = data.patches(where)
    assert len(np.intersect1d(train, test)) == 0
    assert len(np.unique(train)) == train.size


def test_split_is_stratified():
    y = np.repeat([0, 1, 2], [1000, 100, 10])
    for seed in range(5):
        train, test = data.stratified_split(y, .2, seed)
        assert np.bincount(y[test]).tolist() == [200, 20, 2] and len(np.intersect1d(train, test)) == 0
    with pytest.raises(ValueError, match='test_fraction'):
        data.stratified_split(y, 1.)


def image_folder(root, sizes=((20, 30), (16, 16), (40, 8)), classes=('ant', 'bee')):
    from PIL import Image
    r = np.random.default_rng(0)
    for c in classes:
        (root/c).mkdir(parents=True)
        for i, (w, h) in enumerate(sizes):
            Image.fromarray(r.integers(0, 256, (h, w, 3), 'u1')).save(root/c/f'{i}.png')
    return root


def test_folder_with_and_without_parts(tmp_path):
    image_folder(tmp_path/'a', [(9, 9)] * 5)
    task = data.load('imagenet', ('bee', 'ant'), root=tmp_path/'a', size=12)
    assert (task.input_shape, task.classes, len(task.x_train),
            len(task.x_test)) == ((3, 12, 12), ('bee', 'ant'), 8, 2)
    image_folder(tmp_path/'b/train')
    image_folder(tmp_path/'b/val', [(5, 5)])
    task = data.from_folder(tmp_path/'b', size=8)
    assert (task.classes, len(task.x_train), len(task.x_test)) == (('ant', 'bee'), 6, 2)


def test_resize_matches_torchvision(tmp_path):
    from PIL import Image
    data.import_torchvision()
    from torchvision import transforms
    path = image_folder(tmp_path)/'ant/0.png'
    expected = np.asarray(transforms.Resize((24, 24))(Image.open(path)))
    np.testing.assert_array_equal(data.read_image(path, 24), expected)


def test_hostile_images(tmp_path, monkeypatch):
    folder = image_folder(tmp_path)
    raw = (folder/'ant/0.png').read_bytes()
    (folder/'ant/1.png').write_bytes(raw[:200])
    with pytest.raises(ValueError, match='1.png: not a usable image'):
        data.from_folder(folder, size=8)
    i = raw.index(b'IHDR') + 4
    header = (10**5).to_bytes(4, 'big') * 2 + raw[i + 8:i + 13]
    huge = raw[:i] + header + zlib.crc32(b'IHDR' + header).to_bytes(4, 'big') + raw[i + 17:]
    (folder/'ant/1.png').write_bytes(huge)
    with pytest.raises(ValueError, match='1.png'):
        data.from_folder(folder, size=8)
    monkeypatch.setattr(data, '_max_bytes', lambda: 1000)
    with pytest.raises(ValueError, match='fit here'):
        data.from_folder(folder, size=64)


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match='no such folder'):
        data.from_folder(tmp_path/'none')
    image_folder(tmp_path/'a')
    (tmp_path/'a/empty').mkdir()
    with pytest.raises(ValueError, match="class 'empty'"):
        data.from_folder(tmp_path/'a', size=8)
    with pytest.raises(ValueError, match="class 'cow'"):
        data.from_folder(tmp_path/'a', ('ant', 'cow'), size=8)


# ---- real data

def spam_zip(path, text):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('spambase.data', text)
    return path.as_uri()


def test_download_checks_what_it_gets(alone, monkeypatch):
    with pytest.raises(ValueError, match='wrong checksum'):
        data._fetch_spambase(alone/'data', spam_zip(alone/'bad.zip', b'1,2\n'))
    assert not (alone/'data').exists()
    monkeypatch.setattr(data, '_fetch_spambase', lambda folder: (_ for _ in ()).throw(OSError('no network')))
    with pytest.raises(ValueError, match=r'no network.*set RAB_DATA'):
        data.load('spambase')


@real
def test_spambase_download_equals_npz(tmp_path):
    text = (Path(REAL)/'spambase.data').read_bytes()
    url = spam_zip(tmp_path/'spambase.zip', text.replace(b'\n', b'\r\n'))
    data._fetch_spambase(tmp_path/'got', url)
    a, b = data.load('spambase', root=tmp_path/'got', download=False), data.load('spambase')
    assert [p.name for p in (tmp_path/'got').iterdir()] == ['spambase.data'] and 'spambase.data' in a.source
    for k in ('x_train', 'y_train', 'x_test', 'y_test'):
        np.testing.assert_array_equal(getattr(a, k), getattr(b, k))


@real
def test_spambase_against_the_file():
    table = np.loadtxt(Path(REAL)/'spambase.data', delimiter=',')
    task = data.load('spambase')
    assert task.classes == ('not-spam', 'spam')
    assert np.bincount(np.r_[task.y_train, task.y_test]).tolist() == [2788, 1813]
    assert np.bincount(task.y_test).tolist() == [558, 363]
    ours = np.c_[np.r_[task.x_train, task.x_test], np.r_[task.y_train, task.y_test]]
    expected = np.c_[table[:, :54], table[:, 54] / table[:, 56], table[:, 55] / table[:, 56],
                     table[:, 57]].astype('f')
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], expected[np.lexsort(expected.T)])


@real
@pytest.mark.parametrize('name, classes, train, test, shape', [
    ('mnist', (0, 1), 12665, 2115, (1, 28, 28)), ('mnist', (8, 6), 11769, 1932, (1, 28, 28)),
    ('cifar10', ('airplane', 'bird'), 10000, 2000, (3, 32, 32)),
    ('cifar10', ('automobile', 'dog'), 10000, 2000, (3, 32, 32)),
    ('imagenet', ('cat', 'dog'), 4000, 1000, (3, 64, 64)),
    ('imagenet', ('fish', 'dog'), 1918, 782, (3, 64, 64))])
def test_real_pairs(name, classes, train, test, shape):
    task = data.load(name, classes, download=False)
    assert (task.classes, len(task.x_train), len(task.x_test), task.input_shape,
            task.stand_in_for) == (classes, train, test, shape, None)
    assert set(task.sha256.split('+')) <= set(data.SHA256.values())
    assert not {x.tobytes() for x in task.x_train} & {x.tobytes() for x in task.x_test}


@real
def test_pixels_are_the_files():
    with np.load(Path(REAL)/'cifar10_airplane_bird.npz') as d:
        task = data.load('cifar10', ('airplane', 'bird'))
        np.testing.assert_array_equal(np.round(task.x_train[:50] * 255).astype('u1').transpose(0, 2, 3, 1),
                                      d['x_train'][:50])
        np.testing.assert_array_equal(task.y_train == 1, d['y_train'] == 2)


@real
def test_classes_across_files_keep_batch_order():
    task = data.load('cifar10', ('airplane', 'dog'), download=False)
    root = Path(REAL)
    with np.load(root/'cifar10_airplane_bird.npz') as a, np.load(root/'cifar10_automobile_dog.npz') as b:
        index = np.r_[a['train_index'][a['y_train'] == 0], b['train_index'][b['y_train'] == 5]]
        np.testing.assert_array_equal(task.y_train, np.repeat([0, 1], 5000)[np.argsort(index)])
    assert task.sha256.count('+') == 1


@real
def test_torchvision_route_equals_npz(tmp_path, monkeypatch):
    "The IDX files that torchvision keeps, rebuilt from the npz file, give the same task."
    monkeypatch.delenv('RAB_DATA', raising=False)
    source = data.load('mnist', (0, 1), root=REAL)
    raw = tmp_path/'MNIST/raw'
    raw.mkdir(parents=True)
    with np.load(Path(REAL)/'mnist.npz') as d:
        for part, name in (('train', 'train'), ('test', 't10k')):
            for k, a, magic in (('images-idx3', d[f'x_{part}'], 0x803),
                                ('labels-idx1', d[f'y_{part}'], 0x801)):
                head = magic.to_bytes(4, 'big') + b''.join(n.to_bytes(4, 'big') for n in a.shape)
                (raw/f'{name}-{k}-ubyte').write_bytes(head + a.tobytes())
    task = data.load('mnist', (0, 1), root=tmp_path, download=False)
    assert 'torchvision' in task.source and task.sha256 == data._MNIST_DIGEST
    for k in ('x_train', 'y_train', 'x_test', 'y_test'):
        np.testing.assert_array_equal(getattr(task, k), getattr(source, k))
    labels = raw/'train-labels-idx1-ubyte'
    labels.write_bytes(labels.read_bytes()[:-1] + b'\x00')
    with pytest.raises(ValueError, match='wrong pixels'):
        data.load('mnist', (0, 1), root=tmp_path, download=False)


def test_other_cifar_classes_through_torchvision(alone, monkeypatch):
    class CIFAR10:
        def __init__(self, root, train, download):
            self.data, self.targets = np.full((20, 32, 32, 3), 51, 'u1'), list(range(10)) * 2
    monkeypatch.setattr(data.import_torchvision().datasets, 'CIFAR10', CIFAR10)
    task = data.load('cifar10', ('cat', 'dog'))
    assert task.x_train.shape == (4, 3, 32, 32)
    assert task.x_train.max() == np.float32(.2)
    assert task.y_train.tolist() == [0, 1, 0, 1]


def test_torchvision_next_to_cpu_torch():
    code = ('from rab_nb.data import import_torchvision as f; tv = f(); assert f() is tv; '
            'print(tv.models.resnet18(num_classes=1).fc.out_features)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, '1'), done.stderr
