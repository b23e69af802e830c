"Files, tensors and modules as people have them: each is read right, or refused with what to do"

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from rab_nb import GaussianNoise, RABClassifier, SmoothedKNNClassifier, certify
from rab_nb.certificate import Certificate
from rab_nb.data import digest, from_arrays, from_file, from_folder, load
from rab_nb.defences import PartitionClassifier
from rab_nb.estimators import SmoothedEnsembleClassifier
from rab_nb.inputs import dataset_arrays
from rab_nb.metrics import certified_accuracy

# ---- folders of images


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4), (shade, 10, 20)).save(path)


def tree(folder, pattern, classes=('cat', 'dog'), n=6):
    for k, c in enumerate(classes):
        for i in range(n):
            picture(folder / pattern.format(c=c, i=i), 40 * k + i)
    return folder


def shades(task):
    return {
        c: sorted(
            np.unique(np.r_[task.x_train, task.x_test][np.r_[task.y_train, task.y_test] == k, 0] * 255)
            .round()
            .astype(int)
            .tolist()
        )
        for k, c in enumerate(task.classes)
    }


WANTED = {'cat': list(range(6)), 'dog': [40 + i for i in range(6)]}


@pytest.mark.parametrize(
    'pattern',
    [
        '{c}/{i}.png',
        '{c}/sub/{i}.PNG',
        '{c}.{i}.png',
        '{c}_{i}.png',
        '{c}-{i}.png',
        '{c}{i:03}.png',
        '{c} ({i}).png',
    ],
)
def test_classes_in_folders_and_in_names(tmp_path, pattern):
    task = from_folder(tree(tmp_path / 'd', pattern), size=4)
    assert task.classes == ('cat', 'dog') and shades(task) == WANTED


@pytest.mark.parametrize('pattern', ['{c}/{i}.png', '{c}.{i}.png'])
def test_what_programs_leave_behind_is_no_class_and_no_image(tmp_path, pattern):
    folder = tree(tmp_path / 'd', pattern)
    litter = ('.ipynb_checkpoints', '__MACOSX', '@eaDir', '.git', '__pycache__', '$RECYCLE.BIN', 'lost+found')
    for name in litter:
        for where in (folder, folder / 'cat') if '/' in pattern else (folder,):
            picture(where / name / 'cat.0.png', 200)
    for name in ('._cat.0.png', 'Thumbs.db', '.DS_Store', 'desktop.ini', '~$cat.png'):
        (folder / name).write_bytes(b'none')
    task = from_folder(folder, size=4)
    assert task.classes == ('cat', 'dog') and shades(task) == WANTED


@pytest.mark.parametrize(
    'train, test',
    [
        ('train', 'val'),
        ('Train', 'Test'),
        ('training', 'testing'),
        ('train', 'valid'),
        ('training_set', 'test_set'),
        ('TRAIN', 'validation'),
    ],
)
@pytest.mark.parametrize('pattern', ['{c}/{i}.png', '{c}.{i}.png'])
def test_parts_by_every_name(tmp_path, train, test, pattern):
    tree(tmp_path / train, pattern), tree(tmp_path / test, pattern, n=2), (tmp_path / '__MACOSX').mkdir()
    task = from_folder(tmp_path, size=4)
    assert (task.classes, len(task.x_train), len(task.x_test)) == (('cat', 'dog'), 12, 4)


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda d: tree(d / 'train', '{c}/{i}.png'), 'needs a test part'),
        (
            lambda d: (
                tree(d / 'train', '{c}/{i}.png'),
                tree(d / 'val', '{c}/{i}.png', ('cat', 'dog', 'fox')),
            ),
            'fox',
        ),
        (
            lambda d: (tree(d / 'train', '{c}/{i}.png'), tree(d / 'val', '{c}/{i}.png', ('cat',))),
            "class 'dog'",
        ),
        (lambda d: tree(d / 'PetImages', '{c}/{i}.png'), 'pass .*PetImages'),
        (lambda d: tree(d, '{i}.png', ('cat',)), 'does not follow from their names'),
        (lambda d: (tree(d, '{c}.{i}.png'), picture(d / 'holiday.png', 1)), 'the first is holiday.png'),
        (lambda d: tree(d, 'IMG_2020{i:02}_{i}.png', ('cat',)), 'classes|one class only'),
        (lambda d: tree(d, '2020-01-{i:02}.png', ('cat',)), 'does not follow'),
        (lambda d: (tree(d, '{c}/{i}.png'), (d / 'empty').mkdir()), "class 'empty'"),
        (lambda d: (tree(d, '{c}/{i}.png'), (d / 'cat/3.png').write_bytes(b'')), 'not a usable image'),
        (lambda d: tree(d, '{c}/{i}.png', n=1), 'too few'),
    ],
)
def test_folders_that_can_be_read_in_two_ways_are_refused(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(ValueError, match=words):
        from_folder(tmp_path, size=4)


@pytest.mark.parametrize('size', [0, -1, 3.5])
def test_sizes(tmp_path, size):
    with pytest.raises(ValueError, match='size must be'):
        from_folder(tree(tmp_path, '{c}/{i}.png'), size=size)


def test_load_takes_the_path_of_a_folder_or_says_to_unpack(tmp_path):
    assert load(str(tree(tmp_path / 'd', '{c}/{i}.png')), size=4).classes == ('cat', 'dog')
    (tmp_path / 'd.zip').write_bytes(b'PK')
    with pytest.raises(ValueError, match='unpack'):
        from_folder(tmp_path / 'd.zip')


# ---- certificates that went through a spreadsheet

P = np.random.default_rng(0).dirichlet([5, 1], (200, 7))
CERTIFICATES = {
    'names': certify(P, GaussianNoise(0.5), classes=['no', 'ja; nein, "x"']),
    'numbers': certify(P, GaussianNoise(0.5), classes=[0.5, 1.5]),
    'flags': certify(P, GaussianNoise(0.5), classes=[False, True], simultaneous=False),
    'labels': certify(P, GaussianNoise(0.5), label_noise=0.1, test_sigma=0.25),
    'exact': SmoothedKNNClassifier(sigma=0.5).fit(P[0], [0, 1, 0, 1, 0, 1, 1]).certify(P[1]),
}
FLAGS = {
    'en': ('TRUE', 'FALSE'),
    'de': ('WAHR', 'FALSCH'),
    'fr': ('VRAI', 'FAUX'),
    'es': ('VERDADERO', 'FALSO'),
}


def rewritten(certificate, path, separator, comma, flags, encoding, first, digits=None):
    "As a spreadsheet saves what it has opened: numbers and flags in its own way, the rest as it was"
    certificate.to_csv(path)

    def cell(v):
        if v in ('True', 'False'):
            return FLAGS[flags][v == 'False']
        try:
            v = v if digits is None or float(v) == int(float(v)) else f'{float(v):.{digits}g}'
            return v.replace('.', ',') if comma and np.isfinite(float(v)) else v
        except ValueError:
            return v

    head, *rows = csv.reader(io.StringIO(path.read_text(encoding='utf-8')))
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows(
        [head, *([cell(v) for v in row] for row in rows), [''] * len(head)]
    )
    path.write_bytes((first + out.getvalue()).encode(encoding))
    return path


@pytest.mark.parametrize('kind', CERTIFICATES)
@pytest.mark.parametrize(
    'separator, comma, flags, encoding, first',
    [
        (',', False, 'en', 'utf-8-sig', ''),
        (';', True, 'de', 'utf-8-sig', ''),
        ('\t', True, 'fr', 'utf-16', ''),
        (';', True, 'es', 'utf-8', 'sep=;\r\n'),
        ('\t', False, 'en', 'utf-8', ''),
    ],
)
def test_certificates_survive_spreadsheets(tmp_path, kind, separator, comma, flags, encoding, first):
    path = rewritten(CERTIFICATES[kind], tmp_path / 'c.csv', separator, comma, flags, encoding, first)
    assert Certificate.from_csv(path) == CERTIFICATES[kind]


def test_rounded_certificates_are_refused(tmp_path):
    path = rewritten(CERTIFICATES['names'], tmp_path / 'c.csv', ';', True, 'de', 'utf-8-sig', '', digits=4)
    with pytest.raises(ValueError, match='save them with all digits'):
        Certificate.from_csv(path)


@pytest.mark.parametrize(
    'content, words',
    [
        (None, 'cannot be read'),
        (b'', 'not a certificate'),
        (b'PK\3\4' + bytes(90), 'save it as CSV'),
        (b'a,b\n1,2\n', 'not a certificate'),
        (bytes(range(256)), 'UTF-8'),
        ('cut', 'fields|mixes'),
    ],
)
def test_files_that_are_no_certificates(tmp_path, content, words):
    path = tmp_path / 'c.csv'
    if content == 'cut':
        CERTIFICATES['names'].to_csv(path)
        content = path.read_bytes()[:-20]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Certificate.from_csv(path)


@pytest.mark.parametrize('name', ['cat/a.heic', 'dog/b.SVG', 'cat/sub/c.avif'])
def test_pictures_of_other_kinds_are_not_passed_over(tmp_path, name):
    folder = tree(tmp_path, '{c}/{i}.png')
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b'x')
    with pytest.raises(ValueError, match='convert them'):
        from_folder(folder, size=4)


def test_classes_that_differ_in_capitals(tmp_path):
    folder = tree(tmp_path, '{c}.{i}.png', ('Cat', 'cat', 'dog'))
    with pytest.raises(ValueError, match='capitals'):
        from_folder(folder, size=4)
    assert from_folder(folder, ('Cat', 'dog'), size=4).classes == ('Cat', 'dog')
    with pytest.raises(ValueError, match='classes must be names'):
        from_folder(folder, 'cat', size=4)
    for size in ((4, 4), None, '4', 4.5):
        with pytest.raises(ValueError, match='whole number of pixels'):
            from_folder(folder, size=size)


# ---- tables and archives

TABLE = np.random.default_rng(1).normal(size=(40, 2)).round(6)
LABELS = np.array(['ja', 'nein'] * 20)


@pytest.mark.parametrize(
    'name, options',
    [
        ('a.csv', {}),
        ('a.csv', dict(sep=';', decimal=',', encoding='utf-8-sig')),
        ('A.CSV', dict(sep='\t')),
        ('a.tsv', dict(sep='\t', decimal=',')),
        ('a.csv', dict(sep='\t', encoding='utf-16')),
    ],
)
@pytest.mark.parametrize('label', ['label', ' Label'])
def test_tables_of_spreadsheets(tmp_path, name, options, label):
    import pandas as pd

    frame = pd.DataFrame(TABLE, columns=['a', 'b']).assign(**{label: LABELS})
    frame.to_csv(tmp_path / 'plain.csv', index=False)
    frame.to_csv(tmp_path / name, index=False, **options)
    one, two = load(str(tmp_path / 'plain.csv')), load(str(tmp_path / name))
    assert digest(one.x_train, one.y_train) == digest(two.x_train, two.y_train)
    assert {*one.x_train.ravel()} <= {*TABLE.astype(np.float32).ravel()}


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda f: f.reset_index(), 'OK'),
        (lambda f: f.assign(a='x'), "column 'a' holds 'x' in row 0"),
        (lambda f: f.assign(b=f.b.where(f.index != 3)), "column 'b' is empty in row 3"),
        (lambda f: f.assign(b=f.b.where(f.index != 3, np.inf)), "column 'b' holds inf in row 3"),
        (lambda f: f[:0], 'no rows below'),
        (lambda f: f.assign(label=f.label.where(f.index > 2)), '3 rows have no label, the first is row 0'),
        (lambda f: f.rename(columns=dict(label='kind')), "no column 'label'"),
    ],
)
def test_tables_that_are_refused(tmp_path, change, words):
    import pandas as pd

    frame = change(pd.DataFrame(TABLE, columns=['a', 'b']).assign(label=LABELS))
    frame.to_csv(tmp_path / 'a.csv', index=words == 'OK')
    with pytest.raises(ValueError, match='index=False' if words == 'OK' else words):
        from_file(tmp_path / 'a.csv')


MARGINS = {  # what spreadsheets put around a table; (lines with separators `,`) -> lines
    'nameless columns': lambda lines: [line + ',,' for line in lines],
    'separators behind rows': lambda lines: [lines[0], *(line + ',' for line in lines[1:])],
    'empty rows': lambda lines: [*lines, ',,', '', ',,'],
    'said separator': lambda lines: ['sep=;', *(line.replace(',', ';') for line in lines)],
    'quotes': lambda lines: [','.join(f'"{cell}"' for cell in line.split(',')) for line in lines],
}


@pytest.mark.parametrize('margin', MARGINS)
@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['LF', 'CRLF'])
@pytest.mark.parametrize('classes', [(0, 1), ('no', 'yes')], ids=['numbers', 'names'])
def test_tables_with_margins(tmp_path, margin, end, classes):
    "Labels stay what they are, and no column becomes an index: separators behind rows shifted them all."
    lines = ['label,a,b', *(f'{classes[i % 2]},{a},{b}' for i, (a, b) in enumerate(TABLE))]
    for name, text in (('plain.csv', lines), ('wide.csv', MARGINS[margin](lines))):
        (tmp_path / name).write_bytes((end.join(text) + end).encode())
    one, two = from_file(tmp_path / 'plain.csv'), from_file(tmp_path / 'wide.csv')
    assert one.classes == two.classes == classes and one.x_train.shape[1] == 2
    assert digest(one.x_train, one.y_train) == digest(two.x_train, two.y_train)


@pytest.mark.parametrize(
    'content, words',
    [
        (b'label,a\nx,1\ny,2,3\n', 'not a usable table'),
        (b'label,a\nx,1,3\ny,2,3\n', 'more cells than the first line'),
        ('label,größe\nx,1\n'.encode('latin-1'), 'CSV UTF-8'),
        (b'PK\x03\x04\xb8\xff', 'CSV UTF-8'),
        (b'', 'not a usable table'),
        (b'x,1\ny,2\n', 'write a first line with names'),
    ],
    ids=['longer row', 'longer rows', 'latin-1', 'archive', 'empty', 'no names'],
)
def test_texts_that_are_no_tables(tmp_path, content, words):
    (tmp_path / 'a.csv').write_bytes(content)
    with pytest.raises(ValueError, match=words):
        from_file(tmp_path / 'a.csv')


def test_names_that_are_no_paths():
    for value in (None, 3, ['a']):
        for read in (load, from_file) if not isinstance(value, list) else (from_file,):
            with pytest.raises(ValueError, match='got '):
                read(value)
    for value in (None, ''):
        with pytest.raises(ValueError, match='folder must be'):
            from_folder(value)


def fake_mnist():
    "Arrays of MNIST's shapes; what they show is told by a digest, which the test replaces"
    rng = np.random.default_rng(0)
    raw = {}
    for part, n in (('train', 60_000), ('test', 10_000)):
        raw |= {
            f'x_{part}': rng.integers(0, 256, (n, 28, 28), 'u1'),
            f'y_{part}': rng.integers(0, 10, n, 'u1'),
        }
    return raw


@pytest.fixture(scope='module')
def mnist():
    return fake_mnist()


@pytest.mark.parametrize(
    'change',
    [
        lambda k, a: (k, a),
        lambda k, a: (k.upper(), a),
        lambda k, a: (f'images_{k}', a),
        lambda k, a: (k, a[:, None] if k[0] == 'x' else a.astype(np.int64)),
        lambda k, a: (k, a[..., None] if k[0] == 'x' else a.astype(float)),
        lambda k, a: (k, a.reshape(len(a), -1) if k[0] == 'x' else a),
        lambda k, a: (k, a / np.float32(255) if k[0] == 'x' else a),
        lambda k, a: (k, a if k[0] == 'x' else a.astype(str)),
        lambda k, a: (k, a if k[0] == 'x' else np.eye(10, dtype=np.float32)[a]),
    ],
)
def test_mnist_by_its_pixels(tmp_path, monkeypatch, mnist, change):
    monkeypatch.setattr('rab_nb.data._MNIST_DIGEST', digest(*mnist.values()))
    monkeypatch.delenv('RAB_DATA', raising=False)
    np.savez(tmp_path / 'whatever.npz', **dict(change(k, a) for k, a in mnist.items()))
    np.savez(tmp_path / 'another.npz', x=np.zeros(3))
    for source in (dict(name='mnist', root=tmp_path), dict(name=str(tmp_path / 'whatever.npz'))):
        task = load(classes=(0, 1), download=False, **source)
        rows = np.isin(mnist['y_train'], (0, 1))
        assert np.array_equal(task.x_train, (mnist['x_train'][rows] / 255.0).astype(np.float32)[:, None])
        assert np.array_equal(task.y_train, mnist['y_train'][rows])


def test_mnist_in_one_array(tmp_path, monkeypatch, mnist):
    "70,000 rows of 784 numbers with labels in text, the training digits first, as OpenML has them."
    monkeypatch.setattr('rab_nb.data._MNIST_DIGEST', digest(*mnist.values()))
    monkeypatch.delenv('RAB_DATA', raising=False)
    data = np.concatenate([mnist['x_train'], mnist['x_test']]).reshape(70_000, 784)
    target = np.concatenate([mnist['y_train'], mnist['y_test']]).astype(str)
    np.savez(tmp_path / 'mnist_784.npz', data=data, target=target)
    task = load('mnist', (0, 1), root=tmp_path, download=False)
    np.testing.assert_array_equal(task.y_test, mnist['y_test'][np.isin(mnist['y_test'], (0, 1))])
    np.savez(tmp_path / 'mnist_784.npz', data=data[::-1], target=target[::-1])
    with pytest.raises(ValueError, match='mnist_784.npz has the sizes of MNIST'):
        load('mnist', (0, 1), root=tmp_path, download=False)


def test_one_other_pixel_is_not_mnist(tmp_path, monkeypatch, mnist):
    monkeypatch.setattr('rab_nb.data._MNIST_DIGEST', digest(*mnist.values()))
    monkeypatch.delenv('RAB_DATA', raising=False)
    other = mnist['x_train'].copy()
    other[5, 5, 5] ^= 1
    np.savez(tmp_path / 'whatever.npz', **mnist | dict(x_train=other))
    with pytest.raises(ValueError, match='not downloaded'):
        load('mnist', root=tmp_path, download=False)
    (tmp_path / 'whatever.npz').rename(tmp_path / 'mnist.npz')
    with pytest.raises(ValueError, match='wrong checksum'):
        load('mnist', root=tmp_path, download=False)


# ---- tensors and Datasets

torch.manual_seed(0)
X = torch.randn(40, 4)
Y = (X[:, 0] > 0).long()
MAKERS = {
    'networks': lambda: RABClassifier(
        lambda: nn.Linear(4, 2), GaussianNoise(0.5), n_estimators=2, epochs=1, device='cpu'
    ),
    'knn': lambda: SmoothedKNNClassifier(sigma=0.5),
    'estimators': lambda: SmoothedEnsembleClassifier(
        LogisticRegression(), GaussianNoise(0.5), n_estimators=3
    ),
    'partitions': lambda: PartitionClassifier(LogisticRegression(), 3),
}
SAME = {
    'bf16': lambda x: x.bfloat16(),
    'half': lambda x: x.half(),
    'grad': lambda x: x.clone().requires_grad_(),
    'parameter': nn.Parameter,
    'turned': lambda x: x.t().contiguous().t(),
    'float8': lambda x: x.to(torch.float8_e5m2),
    'list': list,
    'list of bf16': lambda x: list(x.bfloat16()),
    'negative view': lambda x: (x * 1j).conj().imag,
    'list with gradients': lambda x: list(x.clone().requires_grad_()),
}


def as_numpy(x):
    x = torch.stack(x) if isinstance(x, list) else x
    return x.detach().resolve_neg().float().numpy().copy()


@pytest.mark.parametrize('make', MAKERS)
@pytest.mark.parametrize('kind', SAME)
def test_tensors_are_the_numbers_that_they_hold(make, kind):
    x = SAME[kind](X)
    got = MAKERS[make]().fit(x, Y.clone().float().requires_grad_()).predict_proba(x)
    plain = MAKERS[make]().fit(as_numpy(x), Y.numpy()).predict_proba(as_numpy(x))
    np.testing.assert_allclose(got, plain, atol=1e-3 if kind == 'half' else 1e-6)


@pytest.mark.parametrize('make', MAKERS)
@pytest.mark.parametrize(
    'x, words',
    [
        (X.to_sparse(), 'to_dense'),
        (X.to('meta'), 'meta device'),
        (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), 'dequantize'),
        (X + 0j, 'Complex'),
        (TensorDataset(X, Y), 'dataset_arrays'),
        (DataLoader(TensorDataset(X, Y)), 'dataset_arrays'),
        (Subset(TensorDataset(X, Y), [1, 2]), 'dataset_arrays'),
    ],
)
@pytest.mark.parametrize('y', [Y, None])
def test_tensors_without_plain_numbers(make, x, words, y):
    with pytest.raises(ValueError, match=words):
        MAKERS[make]().fit(x, y)


@pytest.mark.parametrize('make', MAKERS)
def test_labels_on_no_device(make):
    with pytest.raises(ValueError, match='y is a tensor on the meta device'):
        MAKERS[make]().fit(X, Y.to('meta'))
    with pytest.raises(ValueError, match='y should be a 1d array'):
        MAKERS[make]().fit(X)


class Pairs(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i].bfloat16(), int(Y[i])


@pytest.mark.parametrize(
    'dataset',
    [
        TensorDataset(X, Y),
        Subset(TensorDataset(X, Y), range(40)),
        Pairs(),
        DataLoader(TensorDataset(X, Y), batch_size=7),
        DataLoader(Pairs(), batch_size=40),
    ],
)
def test_datasets_become_arrays(dataset):
    x, y = dataset_arrays(dataset)
    np.testing.assert_allclose(x, X, atol=0.01)
    np.testing.assert_array_equal(y, Y)
    assert SmoothedKNNClassifier(sigma=0.5).fit(x, y).certify(x).prediction.shape == (40,)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y.tolist()))


def test_streams_become_arrays():
    "A ChainDataset claims a length that it does not have."
    for dataset in (Stream(), torch.utils.data.ChainDataset([Stream()]), DataLoader(Stream(), batch_size=7)):
        np.testing.assert_array_equal(dataset_arrays(dataset)[1], Y)
    with pytest.warns(UserWarning, match='drop_last'):
        assert len(dataset_arrays(DataLoader(TensorDataset(X, Y), 7, drop_last=True))[0]) == 35


class Endless(Dataset):
    def __getitem__(self, i):
        return X[i % 40], int(Y[i % 40])


@pytest.mark.parametrize(
    'dataset, words',
    [
        (None, 'must be a torch Dataset'),
        ({0: (X[0], 1)}, 'must be a torch Dataset'),
        ('mnist', 'must be a torch Dataset'),
        (Endless(), 'no length'),
        ([(X[0], torch.eye(2)[0])] * 3, 'argmax'),
        ([(Image.new('P', (4, 4)), 0)] * 3, "mode 'P'"),
        ([(Image.new('RGB', (4, k)), 0) for k in (4, 5)], 'Resize'),
    ],
    ids=['None', 'dict', 'name', 'endless', 'indicators', 'palette', 'sizes'],
)
def test_datasets_that_are_refused(dataset, words):
    with pytest.raises(ValueError, match=words):
        dataset_arrays(dataset)


@pytest.mark.parametrize('mode', ['P', 'CMYK', 'YCbCr', 'HSV'])
def test_pictures_whose_numbers_are_no_brightness(mode):
    with pytest.raises(ValueError, match='convert'):
        SmoothedKNNClassifier().fit([Image.new(mode, (4, 4))] * 4, [0, 1, 0, 1])


@pytest.mark.parametrize('items', [[], [X[0]], [(X[0], 1, 2)], [(X[0], 0), (X[0, :2], 1)]])
def test_datasets_of_other_things(items):
    with pytest.raises(ValueError, match='pairs'):
        dataset_arrays(items)


def test_tensors_in_tasks_and_metrics():
    task = from_arrays(X.bfloat16(), Y.float().requires_grad_(), X.clone().requires_grad_(), Y)
    assert task.classes == (0, 1)
    c = SmoothedKNNClassifier(sigma=0.5).fit(X, Y).certify(X)
    assert certified_accuracy(c, Y.float().requires_grad_(), 0) == certified_accuracy(c, Y.numpy(), 0)
    with pytest.raises(ValueError, match='missing labels'):
        from_arrays(X, None, X, None)


# ---- modules and saved models


def fit(module, **settings):
    return RABClassifier(
        module, GaussianNoise(0.5), n_estimators=2, epochs=1, **{'device': 'cpu'} | settings
    ).fit(X, Y)


@pytest.mark.parametrize(
    'module, words',
    [
        (nn.Linear, 'without arguments'),
        (lambda: 3, 'must return an nn.Module'),
        (nn.Linear(4, 2).double(), r'module.float\(\)'),
        (nn.Linear(4, 2).bfloat16(), r'module.float\(\)'),
        (nn.Linear(4, 2).to('meta'), 'meta device'),
        (lambda: nn.LazyLinear(2), 'lazy layers'),
        (LogisticRegression(), 'must be an nn.Module'),
        (nn.Linear(4, 2).state_dict(), '(?s)^.{1,200}$'),
        (nn.GRU(4, 2), 'tuple'),
        (nn.Linear(4, 3), 'shape'),
    ],
)
def test_modules_that_cannot_be_trained(module, words):
    with pytest.raises(ValueError, match=words):
        fit(module)


class Returns(nn.Module):
    "A network that returns its logits in a way of its own"

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(4, 2), how

    def forward(self, x):
        return self.how(self.layer(x))


@pytest.mark.parametrize(
    'how, words',
    [
        (lambda out: (out, out), r'a tuple of 2 values.*module\(x\)\[0\]'),
        (lambda out: dict(logits=out), r"keys \['logits'\].*module\(x\)\['logits'\]"),
        (lambda out: type('Output', (), dict(logits=out))(), r'type Output.*module\(x\).logits'),
        (lambda out: None, 'returns None'),
        (lambda out: out + 0j, 'complex64'),
        (lambda out: out.sum(), 'shape'),
    ],
    ids=['tuple', 'dict', 'object', 'None', 'complex', 'number'],
)
def test_what_modules_return_is_named(how, words):
    with pytest.raises(ValueError, match=words):
        fit(Returns(how))


def test_saving_nowhere():
    with pytest.raises(ValueError, match='path must name a file, got None'):
        fit(lambda: nn.Sequential(nn.Linear(4, 2))).save(None)


@pytest.mark.parametrize('device', ['cuda:97', 'mps', 'xpu', 'gpu', 'meta', 'CPU', 0, None])
def test_devices_that_are_absent(device):
    with pytest.raises(ValueError, match='device'):
        fit(lambda: nn.Linear(4, 2), device=device)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp('saved') / 'm.safetensors'
    fit(lambda: nn.Linear(4, 2)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    'cut',
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:20],
        lambda b: b'',
        lambda b: bytes(500),
        lambda b: b'<html>' * 40,
        lambda b: b[:-8] + bytes([b[-8] ^ 255]) + b[-7:],
        lambda b: b.replace(b'rab_nb', b'rab_xx'),
        lambda b: None,
    ],
)
def test_files_that_are_no_models(tmp_path, saved, cut):
    path, content = tmp_path / 'm.safetensors', cut(saved)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match='m.safetensors'):
        RABClassifier.load(path, lambda: nn.Linear(4, 2))


def test_foreign_safetensors_and_folders(tmp_path):
    from safetensors.numpy import save_file

    save_file(dict(weight=np.ones(3)), tmp_path / 'f.safetensors')
    for path in (tmp_path / 'f.safetensors', tmp_path, None):
        with pytest.raises(ValueError):
            RABClassifier.load(path, lambda: nn.Linear(4, 2))
    with pytest.raises(ValueError, match='cannot be written'):
        fit(lambda: nn.Linear(4, 2)).save(tmp_path / 'absent' / 'm.safetensors')
