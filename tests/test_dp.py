"""DP-SGD against independent references: brute-force per-sample gradients, opacus.PrivacyEngine, integration;
and what it refuses."""
import copy
import math
import re
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from rab_nb.dp import DPSGD, check_layers, check_samples, clipped_sum, epsilon, gaussian_epsilon, ghost
from rab_nb.ensemble import RABClassifier
from rab_nb.training import TrainSpec, gradient, loss_per_sample, resolved, train_shard
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
    with torch.no_grad():
        stack.flat.add_(.3 * torch.randn(stack.flat.shape, generator=torch.Generator().manual_seed(seed)))
    return stack


def models_of(stack, net):
    for m in range(stack.n_models):
        one = copy.deepcopy(net)
        one.load_state_dict({k: w[m].detach() for k, w in stack.weights.items()})
        yield m, one


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), m=st.integers(1, 3), b=st.integers(1, 6), c_in=st.integers(1, 3),
       width=st.sampled_from([2, 4, 12]), size=st.integers(1, 4),
       stride=st.integers(1, 3), padding=st.integers(0, 2), bias=st.booleans(),
       n_outputs=st.sampled_from([1, 3]), C=st.floats(.01, 10))
def test_any_small_network_matches_brute_force(seed, m, b, c_in, width, size, stride, padding, bias,
                                               n_outputs, C):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(c_in, width, size, stride, padding, bias=bias), nn.GroupNorm(2, width),
                        nn.ReLU(inplace=True), nn.Conv2d(width, 5, (1, 2)), nn.Tanh(),
                        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, n_outputs, bias=bias))
    stack, x, y = spread(Stack(net, m, folded=True),
                         seed), torch.randn(m, b, c_in, 7, 8), torch.randint(0, max(2, n_outputs), (b,))
    norms = clipped_sum(stack, x, y, loss_per_sample, C)
    for k, one in models_of(stack, net):
        expected, brute = clipped(one.double(), x[k].double(), y, C)
        torch.testing.assert_close(norms[k].double(), brute, rtol=1e-4, atol=1e-5)
        # A parameter's gradient is a sum over the batch and the positions that may cancel: its error is
        # measured against what was added up, the clipped norms, not against what is left.
        atol = 1e-5 + 3e-5 * brute.clamp(max=C).sum().item()
        for name, w in stack.weights.items():
            torch.testing.assert_close(w.grad[k].double(), expected[name], rtol=1e-4, atol=atol)


def test_sequences_and_frozen_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 30), nn.Flatten(), nn.Linear(150, 1))
    for p in net[0].parameters():
        p.requires_grad_(False)
    stack, x, y = Stack(net, 2), torch.randn(2, 4, 5, 3), torch.tensor([0, 1, 1, 0])
    clipped_sum(stack, x, y, loss_per_sample, .3)
    for k, one in models_of(stack, net):
        each = {n: g for n, g in per_sample(one, x[k], y).items() if not n.startswith('0.')}
        norms = torch.cat([e.flatten(1) for e in each.values()], 1).norm(dim=1)
        for n, e in each.items():
            torch.testing.assert_close(stack.weights[n].grad[k],
                                       torch.einsum('b,b...->...', .3 / (norms + 1e-6), e), rtol=1e-4,
                                       atol=1e-6)


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
def test_one_row_moves_the_sum_by_at_most_C(precision):
    torch.manual_seed(0)
    stack, x, y = Stack(mnist_cnn(),
                        folded=True), 20 * torch.randn(1, 6, 1, 28, 28), torch.tensor([0, 1, 1, 0, 1, 0])
    def total(rows):
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            norms = clipped_sum(stack, x[:, rows], y[rows], loss_per_sample, .5)
        assert norms.min() > .5 or len(rows) < 6
        return stack.flat.grad.clone()
    everyone = total(list(range(6)))
    for gone in range(6):
        moved = (everyone - total([i for i in range(6) if i != gone])).norm()
        assert moved < .5 * (1 + 1e-3) if precision == 'float32' else moved < .5 * 1.1


class Views(nn.Module):
    "A linear layer that sees two views of an input; the network goes on with their difference."
    def __init__(self, d=30, width=20, n_outputs=1):
        super().__init__()
        self.shared, self.head = nn.Linear(d, width), nn.Linear(width, n_outputs)

    def forward(self, x):
        a, b = x.flatten(1).chunk(2, 1)
        return self.head((self.shared(a) - self.shared(b)).tanh())


class Tokens(nn.Module):
    "Linear layers on five tokens, the same group norm twice."
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(12, 40), nn.GroupNorm(4, 40)
        self.outer, self.head = nn.Linear(40, 40), nn.Linear(40, 3)

    def forward(self, x):
        x = self.norm(self.inner(x.reshape(len(x), 5, 12)).mT).relu()
        return self.head(self.norm(self.outer(x.mT).mT).mean(2))


class Deep(nn.Module):
    "Many channels, few positions: kernels larger than their windows."
    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(1, 30, 3), nn.Conv2d(30, 40, 2, bias=False)
        self.head = nn.Linear(40, 2)

    def forward(self, x):
        image = x.reshape(len(x), 1, 6, 10)[:, :, :5, :4]
        return self.head(self.conv(self.first(image))[:, :, :2, :2].mean((2, 3)))


NETS = dict(
    convolutions=lambda: nn.Sequential(nn.Unflatten(1, (1, 6, 10)), nn.Conv2d(1, 8, 3, stride=2, padding=1),
                                       nn.GroupNorm(2, 8), nn.ReLU(),
                                       nn.Conv2d(8, 12, (2, 3), padding=(1, 2), groups=4), nn.Tanh(),
                                       nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
                                       nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 1)),
    normalised=lambda: nn.Sequential(nn.Unflatten(1, (1, 6, 10)), nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16),
                                     nn.Flatten(), nn.Linear(16 * 4 * 8, 2)),
    views=Views, tokens=Tokens, deep=Deep,
    layers=lambda: nn.Sequential(nn.Flatten(), nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 3)))
SCALES = [(a, o) for a in (1e-4, 1., 1e3, 1e6) for o in (0., 1e-4, 1., 1e2, 1e4, 1e6)]


def outputs_of(net):
    return 2 if list(net.parameters())[-1].shape[0] == 1 else list(net.parameters())[-1].shape[0]


def inputs(seed, amplitude, offset, n):
    draw = torch.Generator().manual_seed(seed)
    return amplitude * torch.randn(n, 60,
                                   generator=draw) + offset * torch.randn(n, 1, generator=draw).sign(), draw


def rows_in_float64(net, x, y):
    "Gradients of the rows, one by one, by autograd in float64: (n, parameters)."
    net, each = copy.deepcopy(net).double(), []
    for xb, yb in zip(x.double(), y):
        net.zero_grad()
        z = net(xb[None])
        z = torch.cat([torch.zeros_like(z), z], 1) if z.shape[1] == 1 else z
        (-z.log_softmax(1)[0, yb]).backward()
        each.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    return torch.stack(each)


@pytest.mark.parametrize('engine', ['ghost', 'opacus'])
@pytest.mark.parametrize('name', NETS)
def test_no_single_sample_pulls_harder_than_C(name, engine):
    if engine == 'opacus':
        pytest.importorskip('opacus')
    torch.manual_seed(0)
    net, C, reached = NETS[name](), 1e-3, 0
    stack = Stack(net, folded=engine == 'ghost')
    for k, (amplitude, offset) in enumerate(SCALES):
        x, draw = inputs(k, amplitude, offset, 4 if engine == 'ghost' else 2)
        y = torch.randint(0, outputs_of(net), (len(x),), generator=draw)
        for b in range(len(x)):
            DPSGD(C, 0., engine).gradient(stack, x[None, b:b+1], y[b:b+1], loss_per_sample, [None], 1, step=2)
            pull = float(stack.flat.grad.double().norm()) / C
            assert pull <= 1 + 1e-5, (amplitude, offset, pull)
            reached += pull > .99
    assert reached > 20  # clipping had something to do


@pytest.mark.parametrize('name', NETS)
def test_norms_and_sums_are_those_of_float64(name):
    torch.manual_seed(0)
    net = NETS[name]()
    for k, (amplitude, offset) in enumerate([(1e-4, 0.), (1., 0.), (1., 10.), (30., 1.)]):
        x, draw = inputs(k, amplitude, offset, 8)
        y = torch.randint(0, outputs_of(net), (8,), generator=draw)
        each = rows_in_float64(net, x, y)
        stack, C = Stack(net, 2, folded=True), float(each.norm(dim=1).median())
        norms = clipped_sum(stack, torch.stack([x, x.flip(0)]), y, loss_per_sample, C)[0].double()
        torch.testing.assert_close(norms, each.norm(dim=1), rtol=1e-4, atol=1e-7)
        expected = ((C / each.norm(dim=1)).clamp(max=1)[:, None] * each).sum(0)
        found = torch.cat([w.grad[0].flatten() for w in stack.weights.values()]).double()
        assert (found - expected).norm() < 2e-4 * C


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(NETS)), amplitude=st.floats(-4, 6),
       offset=st.floats(-4, 6), C=st.floats(-6, 3),
       m=st.integers(1, 3), spread_of_rows=st.floats(0, 4))
def test_pulls_at_random_scales(seed, name, amplitude, offset, C, m, spread_of_rows):
    torch.manual_seed(seed)
    net, C = NETS[name](), 10**C
    stack = spread(Stack(net, m, folded=True), seed)
    x, draw = inputs(seed, 10**amplitude, 10**offset, m * 3)
    x = (x * 10**(spread_of_rows * torch.rand(m * 3, 1, generator=draw))).unflatten(0, (m, 3))
    y = torch.randint(0, outputs_of(net), (3,), generator=draw)
    def total(weights):  # of the samples' losses: batch and rounding in the network stay the same
        clipped_sum(stack, x, y, lambda outputs, y: weights * loss_per_sample(outputs, y), C)
        return torch.cat([w.grad.flatten(1) for w in stack.weights.values()], 1).double()
    shares = torch.stack([total(one) for one in torch.eye(3)])
    assert (shares.norm(dim=2) <= C * (1 + 1e-5)).all()
    assert ((total(torch.ones(3)) - shares.sum(0)).norm(dim=1) <= 1e-5 * C).all()


def test_windows_that_share_an_offset_do_not_cancel_in_the_norm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(64, 2))
    net[3].requires_grad_(False)
    stack, signs = Stack(net, 1, folded=True), torch.tensor([1., -1, 1])
    signs = signs[:, None] * signs
    for amplitude in (1., 1e2, 1e3, 1e4, 1e6):
        for _ in range(15):
            x = torch.randn(1, 1, 64, 3, 3) + amplitude * torch.randn(1, 1, 64, 1, 1) * signs
            norm = clipped_sum(stack, x, torch.tensor([0]), loss_per_sample, 1e-2)
            assert float(stack.flat.grad.norm()) <= 1e-2 * (1 + 1e-5)
            assert torch.isfinite(norm).all()


@pytest.mark.parametrize('offset', [0., 1e2, 1e4, 1e6])
@pytest.mark.parametrize('length, i, o', [(2, 300, 200), (7, 60, 80), (49, 512, 256)])
def test_ghost_norms_are_never_too_small(offset, length, i, o):
    torch.manual_seed(0)
    for difference in (1., 1e-3):  # the gradients of a sample add up to this much
        rows = offset * torch.randn(2, 3, 1, i) + torch.randn(2, 3, length, i)
        grads = torch.randn(2, 3, length, o)
        grads = grads - (1 - difference) * grads.mean(2, keepdim=True)
        squares, total = ghost(rows, grads)
        true = torch.linalg.matrix_norm(grads.mT.double() @ rows.double())
        assert (squares.sqrt() >= true * (1 - 1e-6)).all()
        bound = (i + o
                 + length**2) * 2.**-51 * (
                     rows.double().square().sum((2, 3)) * grads.double().square().sum((2, 3)))
        assert (squares <= true.square() * (1 + 1e-6) + bound).all()
        one = torch.zeros(2, 3)
        one[:, 1] = 1
        formed = grads[:, 1].mT.double() @ rows[:, 1].double()
        assert (total(one) - formed).norm() <= 1e-6 * formed.norm()


def test_bf16_pulls_at_most_C_at_any_scale():
    torch.manual_seed(0)
    for name in ('views', 'tokens', 'deep', 'convolutions'):
        net = NETS[name]()
        stack = Stack(net, folded=True)
        for amplitude, offset in ((1., 0.), (1., 1e4), (1e-2, 1e6)):
            x, _ = inputs(1, amplitude, offset, 1)
            with torch.autocast('cpu', torch.bfloat16):
                clipped_sum(stack, x[None], torch.tensor([1]), loss_per_sample, 1e-3)
            assert float(stack.flat.grad.double().norm()) <= 1e-3 * (1 + 1e-5)


class Chance(nn.Module):
    "What a network may and may not do with the rows of a batch, in one mode or both."
    def __init__(self, what, when='training'):
        super().__init__()
        self.what, self.when, self.layer, self.head = what, when, nn.Linear(20, 16), nn.Linear(16, 1)

    def forward(self, x):
        h = self.layer(x.flatten(1)).relu()
        if self.training or self.when == 'always':
            h = getattr(self, self.what)(h)
        return self.head(h)

    def nothing(self, h): return h
    def dropout(self, h): return nn.functional.dropout(h, .5)
    def noise(self, h): return h + torch.randn_like(h)
    def depth(self, h): return h * (torch.rand(len(h), 1) < .7)
    def centre(self, h): return h - h.mean(0)
    def detached(self, h): return h - h.mean(0).detach()
    def largest(self, h): return h / (1 + h.abs().max())
    def mixup(self, h): return .7 * h + .3 * h[torch.randperm(len(h))]
    def shuffle(self, h): return h[torch.randperm(len(h))]
    def neighbour(self, h): return h + .1 * h.roll(1, 0)
    def weights(self, h): return h + self.layer.weight.square().sum()


@pytest.mark.parametrize('engine', ['ghost', 'opacus'])
@pytest.mark.parametrize('what, fine',
                         [('nothing', True), ('dropout', True), ('noise', True), ('depth', True),
                          ('centre', False), ('detached', False), ('largest', False),
                          ('mixup', False), ('shuffle', False), ('neighbour', False), ('weights', False)])
def test_mixing_in_training_is_found_and_chance_is_not_mistaken_for_it(what, fine, engine):
    if engine == 'opacus':
        pytest.importorskip('opacus')
    torch.manual_seed(3)
    for scale, offset in ((1., 0.), (1e-3, 0.), (1e4, 0.), (1., 1e5)):
        stack, before = Stack(Chance(what), folded=engine == 'ghost'), torch.get_rng_state()
        x, y = scale * torch.randn(1, 6, 20,
                                   generator=torch.Generator().manual_seed(1)) + offset, torch.tensor(
                                       [0, 1, 1, 0, 1, 0])
        first = lambda: DPSGD(1., 0., engine).gradient(stack, x, y, loss_per_sample, [None], step=1)
        if not fine:
            with pytest.raises(ValueError, match='other gradients .* mixes the rows'):
                first()
        else:
            check_samples(stack, x, y, loss_per_sample, engine)
            assert torch.equal(torch.get_rng_state(), before)
            first()
        assert stack.module.training


def test_one_row_and_equal_rows_still_show_mixing():
    y = torch.tensor([1])
    for x in (torch.ones(1, 1, 20), torch.ones(1, 6, 20), torch.full((1, 2, 20), math.nan)):
        with pytest.raises(ValueError, match='mixes the rows'):
            check_samples(Stack(Chance('centre'), folded=True), x, y.expand(x.shape[1]), loss_per_sample)
        check_samples(Stack(Chance('dropout'), folded=True), x, y.expand(x.shape[1]), loss_per_sample)


@pytest.mark.parametrize('what, message', [('centre', 'mixes the rows'), ('dropout', None)])
def test_the_ensemble_refuses_mixing_in_training(data, what, message):
    x, y = data
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), Chance(what))
    clf = RABClassifier(module, GaussianNoise(.3), 2, 1, 20, 5e-3, dp=DPSGD(1., .1), device='cpu', stack=1)
    if message is None:
        clf.fit(x, y)
    else:
        with pytest.raises(ValueError, match=message):
            clf.fit(x, y)


@pytest.mark.parametrize('engine', ['ghost', 'opacus'])
def test_the_message_blames_inputs_or_learning_rate_but_not_the_wrong_one(data, engine):
    if engine == 'opacus':
        pytest.importorskip('opacus')
    x, y = (torch.from_numpy(t) for t in data)
    def error(x, scale_of_weights=1., step=None):
        stack = Stack(digits_cnn(), folded=engine == 'ghost')
        with torch.no_grad():
            stack.flat *= scale_of_weights
        with pytest.raises(ValueError, match='is NaN or infinite') as e:
            DPSGD(1., 0., engine).gradient(stack, x[None, :5], y[:5], loss_per_sample, [None], 5, step=step)
        return str(e.value)
    for value in (math.nan, math.inf, 3e38, 1e30):
        bad = x.clone()
        bad[2:4, 0, 3, 3] = value  # rows of either label: of one, the loss is 0
        assert re.search('number [23] of its batch', error(bad))
        assert 'scale the training inputs' in error(bad)
        assert 'lr' not in error(bad)
    assert 'scale the training inputs' in error(x * 1e37, step=1) and 'lr' not in error(x * 1e37, step=1)
    for factor in (1e25, math.nan):
        assert 'smaller lr' in error(x, factor) and 'input' not in error(x, factor)
    both = error(x * 1e30, 1e25)
    assert 'scale the training inputs' in both and 'smaller lr' in both


def test_a_learning_rate_that_is_too_large_is_named(data):
    x, y = data
    spec = TrainSpec(digits_cnn, GaussianNoise(.3), epochs=20, batch_size=20, lr=1e20, dp=DPSGD(1., 1.),
                     device='cpu', stack=2, precision='float32')
    with pytest.raises(ValueError, match='diverged.*smaller lr') as e:
        train_shard(spec, x, y, dict(e=x[:2]), [0])
    assert 'input' not in str(e.value)


@pytest.mark.parametrize('engine', ['ghost', 'opacus'])
@pytest.mark.parametrize('value', [math.nan, math.inf, 3e38, 1e30])
def test_after_the_first_step_a_gradient_that_is_not_finite_makes_its_model_nan(data, engine, value):
    if engine == 'opacus': pytest.importorskip('opacus')
    x, y = (torch.from_numpy(t) for t in data)
    n = 1 if engine == 'opacus' else 3
    stack, rows = (
        Stack(digits_cnn(), n, folded=engine == 'ghost'),
        torch.stack([x[5 * m : 5 * m + 5] for m in range(n)]),
    )
    def gradient():
        DPSGD(1., 0., engine).gradient(stack, rows, y[:5], loss_per_sample, [None] * n, 5, step=2)
        return torch.cat([w.grad.reshape(n, -1) for w in stack.weights.values()], 1)
    before = gradient()
    rows[-1, 2:4, 0, 3, 3] = value  # rows of either label: of one, the loss is 0
    after = gradient()
    assert after[-1].isnan().all() and torch.equal(after[:-1], before[:-1]) and before.isfinite().all()


def test_a_loss_that_overflows_by_itself_blames_neither(data):
    x, y = (torch.from_numpy(t) for t in data)
    loss = lambda outputs, y: loss_per_sample(outputs, y) / 0.
    with pytest.raises(ValueError, match='neither its input nor the weights are large') as e:
        clipped_sum(Stack(digits_cnn(), folded=True), x[None, :3], y[:3], loss, 1.)
    assert 'lr' not in str(e.value)


def test_only_the_first_step_waits_for_the_numbers(data):
    class Looks(TorchDispatchMode):
        "Operators whose result the host has to wait for."
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            if f.overloadpacket.__name__ in ('nonzero', '_local_scalar_dense', 'item', 'equal', 'is_nonzero'):
                seen.append(f)
            return f(*args, **kwargs or {})
    x, y = (torch.from_numpy(t) for t in data)
    for net in (digits_cnn(), nn.Sequential(nn.Flatten(), Tokens())):
        seen, stack, dp = [], Stack(net, 2, folded=True), DPSGD(1., 1.)
        rows = torch.stack([x[:6], x[6:12]])
        if isinstance(net[0], nn.Flatten):
            rows = rows.flatten(2)[..., :60]
        draws = [generator(0, 'dp-noise', k, 2) for k in range(2)]
        with Looks():
            dp.gradient(stack, rows, y[:6], loss_per_sample, draws, 6, step=2)
        assert not seen, seen


def train_with_opacus(net, X, y, C, batch_size, make, lr):
    opacus = pytest.importorskip('opacus')
    net = copy.deepcopy(net)
    data = DataLoader(TensorDataset(X, y), batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net, optimiser, data = opacus.PrivacyEngine().make_private(
            module=net, optimizer=make(net.parameters(), lr=lr), data_loader=data,
            noise_multiplier=0., max_grad_norm=C, poisson_sampling=False)
        for xb, yb in data:
            optimiser.zero_grad()
            loss_per_sample(net(xb), yb).mean().backward()
            optimiser.step()
    return dict(net.to_standard_module().named_parameters())


@pytest.mark.parametrize('make_net, shape', [
    (mnist_cnn, (1, 28, 28)), (lambda: mnist_cnn(n_outputs=10), (1, 28, 28)),
    (lambda: small_resnet(norm='group'), (3, 16, 16)),
    (lambda: preact_resnet(n_blocks=2, widths=(8, 16, 32), norm='group'), (3, 8, 8)),
    (lambda: mlp(12), (12,))], ids=['mnist', 'mnist-10', 'small-resnet', 'preact', 'mlp'])
def test_twenty_steps_equal_opacus(make_net, shape):
    # Plain descent: Adam turns round-off in near-zero gradients into steps of size lr, and Opacus in float32
    # then differs from itself in float64 by 1e-3.
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
        DPSGD(.5, noise).gradient(stack, x, y, loss_per_sample,
                                  [generator(1, 'dp-noise', k, step) for k in range(3)], batch_size=32)
        return torch.stack([torch.cat([w.grad[m].flatten() for w in stack.weights.values()])
                            for m in range(3)])
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
    spec = TrainSpec(digits_cnn, GaussianNoise(.3), epochs=2, batch_size=20, lr=5e-3, dp=DPSGD(1., .1),
                     device='cpu', precision='float32', stack=4, test_noise='none')
    four = train_shard(spec, x, y, dict(e=x[:5]), range(4))['probabilities']['e']
    for k in range(4):
        alone = train_shard(TrainSpec(**{**vars(spec), 'stack': 1}), x, y, dict(e=x[:5]),
                            [k])['probabilities']['e']
        np.testing.assert_allclose(four[k], alone[0], atol=2e-3)
    fits = [RABClassifier(digits_cnn, GaussianNoise(.3), 8, 2, 20, 5e-3, dp=DPSGD(1., .1), device='cpu',
                          stack=4, n_jobs=n).fit(x, y).predict_proba(x[:5]) for n in (1, 2)]
    assert (fits[0] == fits[1]).all()


def test_engines_give_the_same_ensemble_without_noise(data):
    pytest.importorskip('opacus')
    x, y = data
    fit = lambda engine: RABClassifier(digits_cnn, GaussianNoise(.3), 2, 2, 20, 5e-3,
                                       dp=DPSGD(.5, 0., engine), device='cpu', stack=1, precision='float32',
                                       test_noise='none')
    a, b = (fit(e).fit(x, y).predict_proba(x[:5]) for e in ('ghost', 'opacus'))
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_partial_batches_are_divided_by_the_nominal_size(data):
    x, y = data
    x, y = torch.from_numpy(x)[None], torch.from_numpy(y)
    stack = Stack(digits_cnn(), folded=True)
    spec = resolved(TrainSpec(digits_cnn(), GaussianNoise(1.), batch_size=50, dp=DPSGD(1., 0.), device='cpu',
                              precision='float32'))
    gradient(spec, stack, x[:, :10], y[:10], [0], 1)
    seen = stack.flat.grad.clone()
    clipped_sum(stack, x[:, :10], y[:10], loss_per_sample, 1.)
    torch.testing.assert_close(seen, stack.flat.grad / 50)


def test_a_model_whose_gradient_is_not_finite_stays_and_answers_nothing(data):
    x, y = data
    spec = TrainSpec(digits_cnn, GaussianNoise(.3), epochs=1, batch_size=20, dp=DPSGD(1., 1.), device='cpu',
                     stack=2)
    answers = []
    for row in range(50, 54):
        bad = x.copy()
        bad[row] = 3e38
        try:
            out = train_shard(spec, bad, y, dict(e=x[:2]), [7])
        except ValueError as e:  # the row was in the first batch
            assert re.search('gradient of model [67] at step 1 is NaN or infinite', str(e))
        else:
            answers.append((out['diverged'], np.isnan(out['probabilities']['e']).all()))
    assert (1, True) in answers  # of one label, the loss is 0
    assert all((diverged == 1) == silent for diverged, silent in answers)


@pytest.mark.parametrize('net, message', [
    (small_resnet(), r"layer '1\.norm1', BatchNorm(2d)?, mixes .* nn\.GroupNorm\(4, 16\) .* norm='group'"),
    (nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 1)),
     "layer '1', LayerNorm, is not supported"),
    (nn.Sequential(nn.Conv2d(1, 4, 3, dilation=2), nn.Flatten(), nn.Linear(64, 1)),
     "layer '0', Conv2d, is not supported"),
    (nn.Sequential(nn.Embedding(3, 3)), "layer '0', Embedding")],
                         ids=['batch', 'layer', 'dilated', 'embedding'])
def test_layers_that_cannot_be_clipped_are_named(net, message):
    with pytest.raises(ValueError, match=message):
        check_layers(net)
    with pytest.raises(ValueError, match=message):
        DPSGD(1., 1.).gradient(Stack(net, 2), torch.zeros(2, 3, 1, 8, 8), torch.zeros(3).long(),
                               loss_per_sample, [])


def test_tied_parameters_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match="shares a parameter with layer '0'"):
        check_layers(net)


def test_ensemble_refuses_before_training(data):
    x, y = data
    fit = lambda **kw: RABClassifier(**dict(module=digits_cnn, noise=GaussianNoise(1.), n_estimators=2,
                                            epochs=1, batch_size=32, dp=DPSGD(1., 1.), device='cpu')
                                     | kw).fit(x, y)
    with pytest.raises(ValueError, match='batch_size must be <= 96'):
        fit(batch_size=97)
    norm = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1))
    with pytest.raises(ValueError, match="layer '1', BatchNorm2d"):
        fit(module=norm)


@pytest.mark.parametrize('bad',
                         [dict(max_grad_norm=0.), dict(max_grad_norm=-1.), dict(max_grad_norm=math.nan),
                          dict(max_grad_norm=math.inf),
                          dict(noise_multiplier=-.1), dict(noise_multiplier=math.inf), dict(engine='fast')],
                         ids=repr)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DPSGD(**dict(max_grad_norm=1., noise_multiplier=1.) | bad)


@pytest.mark.parametrize('mu', [.01, .3, 1., 5., 30., 300.])
@pytest.mark.parametrize('delta', [1e-2, 1e-5, 1e-12])
def test_fixed_batches_against_mpmath(mu, delta):
    import mpmath
    e = gaussian_epsilon(mu, delta)
    with mpmath.workdps(60):
        d = lambda e: mpmath.ncdf(mpmath.mpf(mu) / 2
                                  - e / mu) - mpmath.exp(e) * mpmath.ncdf(-mpmath.mpf(mu) / 2 - e / mu)
        assert d(mpmath.mpf(e)) <= delta
        assert e == 0 or d(mpmath.mpf(e) * (1 - mpmath.mpf('1e-6'))) > delta


def test_poisson_accountants_are_opacus():
    accountants = pytest.importorskip('opacus').accountants
    for name, cls in dict(rdp=accountants.RDPAccountant, prv=accountants.PRVAccountant).items():
        assert epsilon(5000, 100, 1, 1.1, accountant=name) <= epsilon(5000, 100, 2, 1.1, accountant=name)
        assert math.isclose(epsilon(3000, 60, 1, 1.1, delta=1e-5, accountant=name),
                            _of(cls, 1.1, .02, 50, 1e-5), rel_tol=1e-3)
        assert math.isclose(epsilon(3000, 60, 1, 1.1, delta=1e-5, accountant=name, n_models=2),
                            _of(cls, 1.1, .02, 100, 1e-5), rel_tol=1e-3)


def _of(cls, noise, rate, steps, delta):
    accountant = cls()
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    return accountant.get_epsilon(delta)


def test_without_opacus_the_message_says_what_to_install(monkeypatch):
    for name in [m for m in sys.modules if m.split('.')[0] == 'opacus']:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, 'opacus', None)
    with pytest.raises(ImportError, match=r'pip install "rab-nb\[dp\]"'):
        epsilon(1000, 100, 2, 1.)
    assert epsilon(1000, 100, 2, 1., accountant='fixed') > 0
    with pytest.raises(ImportError, match="engine='opacus' needs"):
        DPSGD(1., 1., 'opacus').gradient(Stack(mlp(4)), torch.zeros(1, 2, 4), torch.zeros(2).long(),
                                         loss_per_sample, [None])
