"DP-SGD against independent references: brute-force per-sample gradients, opacus.PrivacyEngine, integration; and what it refuses."
import copy
import math
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from rab_nb.dp import DPSGD, check_layers, clipped_sum, epsilon, gaussian_epsilon
from rab_nb.ensemble import RABClassifier, TrainSpec, gradient, loss_per_sample, resolved, train_shard
from rab_nb.models import digits_cnn, mlp, mnist_cnn, preact_resnet, small_resnet
from rab_nb.noise import GaussianNoise, generator
from rab_nb.stacked import Stack

torch.set_num_threads(1)


def per_sample(net, x, y):
    loss = lambda w, xb, yb: loss_per_sample(functional_call(net, w, (xb[None],)), yb[None])[0]
    return vmap(grad(loss), (None, 0, 0))(dict(net.named_parameters()), x, y)


def clipped(net, x, y, C):
    each = per_sample(net, x, y)
    norms = torch.cat([e.flatten(1) for e in each.values()], 1).norm(dim=1)
    factor = (C / (norms + 1e-6)).clamp(max=1)
    return {k: torch.einsum('b,b...->...', factor, e) for k, e in each.items()}, norms


def spread(stack, seed):
    with torch.no_grad(): stack.flat.add_(.3 * torch.randn(stack.flat.shape, generator=torch.Generator().manual_seed(seed)))
    return stack


def models_of(stack, net):
    for m in range(stack.n_models):
        one = copy.deepcopy(net)
        one.load_state_dict({k: w[m].detach() for k, w in stack.weights.items()})
        yield m, one


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), m=st.integers(1, 3), b=st.integers(1, 6), c_in=st.integers(1, 3), width=st.sampled_from([2, 4, 12]), size=st.integers(1, 4),
       stride=st.integers(1, 3), padding=st.integers(0, 2), bias=st.booleans(), n_outputs=st.sampled_from([1, 3]), C=st.floats(.01, 10))
def test_any_small_network_matches_brute_force(seed, m, b, c_in, width, size, stride, padding, bias, n_outputs, C):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(c_in, width, size, stride, padding, bias=bias), nn.GroupNorm(2, width), nn.ReLU(inplace=True), nn.Conv2d(width, 5, (1, 2)), nn.Tanh(),
                        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, n_outputs, bias=bias))
    stack, x, y = spread(Stack(net, m, folded=True), seed), torch.randn(m, b, c_in, 7, 8), torch.randint(0, max(2, n_outputs), (b,))
    norms = clipped_sum(stack, x, y, loss_per_sample, C)
    for k, one in models_of(stack, net):
        expected, brute = clipped(one, x[k], y, C)
        torch.testing.assert_close(norms[k], brute, rtol=1e-4, atol=1e-5)
        for name, w in stack.weights.items(): torch.testing.assert_close(w.grad[k], expected[name], rtol=1e-4, atol=1e-5)


def test_sequences_and_frozen_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 30), nn.Flatten(), nn.Linear(150, 1))
    for p in net[0].parameters(): p.requires_grad_(False)
    stack, x, y = Stack(net, 2), torch.randn(2, 4, 5, 3), torch.tensor([0, 1, 1, 0])
    clipped_sum(stack, x, y, loss_per_sample, .3)
    for k, one in models_of(stack, net):
        each = {n: g for n, g in per_sample(one, x[k], y).items() if not n.startswith('0.')}
        norms = torch.cat([e.flatten(1) for e in each.values()], 1).norm(dim=1)
        for n, e in each.items():
            torch.testing.assert_close(stack.weights[n].grad[k], torch.einsum('b,b...->...', .3 / (norms + 1e-6), e), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
def test_one_row_moves_the_sum_by_at_most_C(precision):
    torch.manual_seed(0)
    stack, x, y = Stack(mnist_cnn(), folded=True), 20 * torch.randn(1, 6, 1, 28, 28), torch.tensor([0, 1, 1, 0, 1, 0])
    def total(rows):
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'): norms = clipped_sum(stack, x[:, rows], y[rows], loss_per_sample, .5)
        assert norms.min() > .5 or len(rows) < 6
        return stack.flat.grad.clone()
    everyone = total(list(range(6)))
    for gone in range(6):
        moved = (everyone - total([i for i in range(6) if i != gone])).norm()
        assert moved < .5 * (1 + 1e-3) if precision == 'float32' else moved < .5 * 1.1


def train_with_opacus(net, X, y, C, batch_size, make, lr):
    opacus = pytest.importorskip('opacus')
    net = copy.deepcopy(net)
    data = DataLoader(TensorDataset(X, y), batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net, optimiser, data = opacus.PrivacyEngine().make_private(module=net, optimizer=make(net.parameters(), lr=lr), data_loader=data,
                                                                   noise_multiplier=0., max_grad_norm=C, poisson_sampling=False)
        for xb, yb in data:
            optimiser.zero_grad()
            loss_per_sample(net(xb), yb).mean().backward()
            optimiser.step()
    return dict(net.to_standard_module().named_parameters())


@pytest.mark.parametrize('make_net, shape', [
    (mnist_cnn, (1, 28, 28)), (lambda: mnist_cnn(n_outputs=10), (1, 28, 28)), (lambda: small_resnet(norm='group'), (3, 16, 16)),
    (lambda: preact_resnet(n_blocks=2, widths=(8, 16, 32), norm='group'), (3, 8, 8)), (lambda: mlp(12), (12,))], ids=['mnist', 'mnist-10', 'small-resnet', 'preact', 'mlp'])
def test_twenty_steps_equal_opacus(make_net, shape):
    # Plain descent: Adam turns round-off in near-zero gradients into steps of size lr, and Opacus in float32 then differs from itself in float64 by 1e-3.
    torch.manual_seed(0)
    net, X, y = make_net(), torch.rand(2, 160, *shape), torch.randint(0, 2, (160,))
    stack, dp = Stack(net, 2), DPSGD(.7, 0.)
    start, optimiser = stack.flat.clone(), torch.optim.SGD([stack.flat], lr=.02)
    for i in torch.arange(160).split(8):
        dp.gradient(stack, X[:, i], y[i], loss_per_sample, [None, None], batch_size=8)
        optimiser.step()
    assert (stack.flat - start).abs().max() > 2e-3
    for m in range(2):
        for name, p in train_with_opacus(net, X[m], y, .7, 8, torch.optim.SGD, .02).items():
            torch.testing.assert_close(stack.weights[name][m].detach(), p.detach(), rtol=0, atol=1e-5)


def test_noise_has_the_scale_of_sigma_C_over_B_and_differs_between_models():
    torch.manual_seed(0)
    stack, x, y = Stack(digits_cnn(), 3), torch.randn(3, 20, 1, 8, 8), torch.randint(0, 2, (20,))
    def private(noise, step):
        DPSGD(.5, noise).gradient(stack, x, y, loss_per_sample, [generator(1, 'dp-noise', k, step) for k in range(3)], batch_size=32)
        return torch.stack([torch.cat([w.grad[m].flatten() for w in stack.weights.values()]) for m in range(3)])
    noise = torch.stack([private(2., s) - private(0., s) for s in range(30)])
    assert abs(noise.std() / (2 * .5 / 32) - 1) < 4 / (2 * noise.numel())**.5 + 1e-5
    correlation = torch.corrcoef(noise.transpose(0, 1).flatten(1))
    assert correlation[~torch.eye(3, dtype=bool)].abs().max() < 4 / noise[:, 0].numel()**.5


@pytest.fixture(scope='module')
def data():
    rows = np.random.default_rng(0)
    y = np.arange(96) % 2
    x = rows.random((96, 1, 8, 8), dtype=np.float32)
    x[y == 1, :, 2:5] += .7
    return x.astype(np.float32), y


def test_stacks_and_workers_do_not_change_the_result(data):
    x, y = data
    spec = TrainSpec(digits_cnn, GaussianNoise(.3), epochs=2, batch_size=20, lr=5e-3, dp=DPSGD(1., .1), device='cpu', precision='float32', stack=4, test_noise='none')
    four = train_shard(spec, x, y, dict(e=x[:5]), range(4))['probabilities']['e']
    for k in range(4):
        alone = train_shard(TrainSpec(**{**vars(spec), 'stack': 1}), x, y, dict(e=x[:5]), [k])['probabilities']['e']
        np.testing.assert_allclose(four[k], alone[0], atol=2e-3)
    fits = [RABClassifier(digits_cnn, GaussianNoise(.3), 8, 2, 20, 5e-3, dp=DPSGD(1., .1), device='cpu', stack=4, n_jobs=n).fit(x, y).predict_proba(x[:5]) for n in (1, 2)]
    assert (fits[0] == fits[1]).all()


def test_engines_give_the_same_ensemble_without_noise(data):
    pytest.importorskip('opacus')
    x, y = data
    fit = lambda engine: RABClassifier(digits_cnn, GaussianNoise(.3), 2, 2, 20, 5e-3, dp=DPSGD(.5, 0., engine), device='cpu', stack=1, precision='float32', test_noise='none')
    a, b = (fit(e).fit(x, y).predict_proba(x[:5]) for e in ('ghost', 'opacus'))
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_partial_batches_are_divided_by_the_nominal_size(data):
    x, y = data
    x, y = torch.from_numpy(x)[None], torch.from_numpy(y)
    stack = Stack(digits_cnn(), folded=True)
    spec = resolved(TrainSpec(digits_cnn(), GaussianNoise(1.), batch_size=50, dp=DPSGD(1., 0.), device='cpu', precision='float32'))
    gradient(spec, stack, x[:, :10], y[:10], [0], 1)
    seen = stack.flat.grad.clone()
    clipped_sum(stack, x[:, :10], y[:10], loss_per_sample, 1.)
    torch.testing.assert_close(seen, stack.flat.grad / 50)


def test_nan_gradient_names_model_and_step(data):
    x, y = data
    bad = x.copy()
    bad[50] = 3e38
    spec = TrainSpec(digits_cnn, GaussianNoise(.3), epochs=1, batch_size=20, dp=DPSGD(1., 1.), device='cpu', stack=2)
    with pytest.raises(ValueError, match=r'gradient of model 6 at step \d is NaN or infinite'): train_shard(spec, bad, y, dict(e=x[:2]), [7])


@pytest.mark.parametrize('net, message', [
    (small_resnet(), r"layer '1\.norm1', BatchNorm(2d)?, mixes .* nn\.GroupNorm\(4, 16\) .* norm='group'"),
    (nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 1)), "layer '1', LayerNorm, is not supported"),
    (nn.Sequential(nn.Conv2d(1, 4, 3, dilation=2), nn.Flatten(), nn.Linear(64, 1)), "layer '0', Conv2d, is not supported"),
    (nn.Sequential(nn.Embedding(3, 3)), "layer '0', Embedding")], ids=['batch', 'layer', 'dilated', 'embedding'])
def test_layers_that_cannot_be_clipped_are_named(net, message):
    with pytest.raises(ValueError, match=message): check_layers(net)
    with pytest.raises(ValueError, match=message): DPSGD(1., 1.).gradient(Stack(net, 2), torch.zeros(2, 3, 1, 8, 8), torch.zeros(3).long(), loss_per_sample, [])


def test_tied_parameters_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match="shares a parameter with layer '0'"): check_layers(net)


def test_ensemble_refuses_before_training(data):
    x, y = data
    fit = lambda **kw: RABClassifier(**dict(module=digits_cnn, noise=GaussianNoise(1.), n_estimators=2, epochs=1, batch_size=32, dp=DPSGD(1., 1.), device='cpu') | kw).fit(x, y)
    with pytest.raises(ValueError, match='batch_size must be <= 96'): fit(batch_size=97)
    norm = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1))
    with pytest.raises(ValueError, match="layer '1', BatchNorm2d"): fit(module=norm)


@pytest.mark.parametrize('bad', [dict(max_grad_norm=0.), dict(max_grad_norm=-1.), dict(max_grad_norm=math.nan), dict(max_grad_norm=math.inf),
                                 dict(noise_multiplier=-.1), dict(noise_multiplier=math.inf), dict(engine='fast')], ids=repr)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): DPSGD(**dict(max_grad_norm=1., noise_multiplier=1.) | bad)


@pytest.mark.parametrize('mu', [.01, .3, 1., 5., 30., 300.])
@pytest.mark.parametrize('delta', [1e-2, 1e-5, 1e-12])
def test_fixed_batches_against_mpmath(mu, delta):
    import mpmath
    e = gaussian_epsilon(mu, delta)
    with mpmath.workdps(60):
        d = lambda e: mpmath.ncdf(mpmath.mpf(mu) / 2 - e / mu) - mpmath.exp(e) * mpmath.ncdf(-mpmath.mpf(mu) / 2 - e / mu)
        assert d(mpmath.mpf(e)) <= delta
        assert e == 0 or d(mpmath.mpf(e) * (1 - mpmath.mpf('1e-6'))) > delta


def test_poisson_accountants_are_opacus():
    accountants = pytest.importorskip('opacus').accountants
    for name, cls in dict(rdp=accountants.RDPAccountant, prv=accountants.PRVAccountant).items():
        assert epsilon(5000, 100, 1, 1.1, accountant=name) <= epsilon(5000, 100, 2, 1.1, accountant=name)
        assert math.isclose(epsilon(3000, 60, 1, 1.1, delta=1e-5, accountant=name), _of(cls, 1.1, .02, 50, 1e-5), rel_tol=1e-3)
        assert math.isclose(epsilon(3000, 60, 1, 1.1, delta=1e-5, accountant=name, n_models=2), _of(cls, 1.1, .02, 100, 1e-5), rel_tol=1e-3)


def _of(cls, noise, rate, steps, delta):
    accountant = cls()
    for _ in range(steps): accountant.step(noise_multiplier=noise, sample_rate=rate)
    return accountant.get_epsilon(delta)


def test_without_opacus_the_message_says_what_to_install(monkeypatch):
    for name in [m for m in sys.modules if m.split('.')[0] == 'opacus']: monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, 'opacus', None)
    with pytest.raises(ImportError, match='pip install opacus'): epsilon(1000, 100, 2, 1.)
    assert epsilon(1000, 100, 2, 1., accountant='fixed') > 0
    with pytest.raises(ImportError, match="engine='opacus' needs"): DPSGD(1., 1., 'opacus').gradient(Stack(mlp(4)), torch.zeros(1, 2, 4), torch.zeros(2).long(), loss_per_sample, [None])
