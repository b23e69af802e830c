"Stacks of models against the models one by one"
import copy
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rab_nb import models, stacked
from rab_nb.stacked import (Stack, check_independence, faster_layout, hashes, load_state, obstacle,
                            state)


def starts(make, m, seed=0):
    torch.manual_seed(seed)
    return [make() for _ in range(m)]


class Scaled(nn.Module):
    "A layer with an attribute that its repr does not show."
    def __init__(self, by):
        super().__init__()
        self.by, self.linear = by, nn.Linear(3, 1)

    def forward(self, x): return self.linear(x * self.by)


@pytest.mark.parametrize('make, shape', [
    (models.digits_cnn, (1, 8, 8)), (lambda: models.small_resnet(), (3, 16, 16)),
    (lambda: models.small_resnet(norm='group'), (3, 16, 16)),
    (lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 1)), (1, 8, 8))])
@pytest.mark.parametrize('m', [1, 3])
@pytest.mark.parametrize('folded', [False, True])
def test_every_model_has_its_own_start(make, shape, m, folded):
    nets, x = starts(make, m), torch.rand(m, 5, *shape)
    for net in nets:
        for _ in range(3):
            net(3 * torch.randn(8, *shape))  # running averages of its own
    stack = Stack([copy.deepcopy(net) for net in nets], folded=folded)
    for k, net in enumerate(nets):
        expected = dict([*net.named_parameters(), *net.named_buffers()])
        assert list(expected) == list(state(stack))
        for name, t in state(stack).items():
            assert torch.equal(t[k], expected[name])
        assert hashes({k: v.detach()[None] for k, v in expected.items()})[0] == hashes(state(stack))[k]
    stack.module.eval()
    for k, net in enumerate(nets):
        assert torch.allclose(stack(x)[k], net.eval()(x[k]), atol=1e-5)


def test_starts_are_copied():
    nets = starts(models.small_resnet, 2)
    before = hashes(state(Stack(nets)))
    for m in (1, 2):
        stack = Stack(nets[:m])
        stack(torch.rand(m, 4, 3, 16, 16)).sum().backward()
        with torch.no_grad():
            stack.flat += 1
    assert hashes(state(Stack(nets))) == before
    assert all(p.grad is None for net in nets for p in net.parameters())


def frozen(net):
    net[0].weight.requires_grad_(False)
    return net


def tied(yes):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if yes:
        net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize('odd, same, message', [
    (lambda: models.digits_cnn(width=8), models.digits_cnn,
     r"parameter '0.weight' of shape \(8, 1, 2, 2\) and torch.float32 where model 0 has parameter "
     r"'0.weight' of shape \(16, 1, 2, 2\)"),
    (lambda: nn.Sequential(nn.Linear(2, 1, bias=False)), lambda: nn.Sequential(nn.Linear(2, 1)),
     "nothing where model 0 has parameter '0.bias'"),
    (lambda: nn.Sequential(nn.Linear(2, 1)).double(), lambda: nn.Sequential(nn.Linear(2, 1)),
     'float64 where'),
    (lambda: frozen(models.digits_cnn()), models.digits_cnn, 'frozen where'),
    (lambda: tied(True), lambda: tied(False), "the same tensor as '0.weight' where"),
    (lambda: models.small_resnet(norm='group'), models.small_resnet,
     "where model 0 has buffer '1.norm1.running_mean'"),
    (lambda: nn.Sequential(nn.Linear(2, 1), nn.ReLU()), lambda: nn.Sequential(nn.Linear(2, 1), nn.Tanh()),
     r"'  \(1\): ReLU\(\)' where model 0 has '  \(1\): Tanh\(\)'"),
    (lambda: Scaled(2.), lambda: Scaled(1.), "another 'by' in the module itself"),
    (lambda: Scaled(torch.ones(3)), lambda: Scaled(torch.zeros(3)), "another 'by'"),
    (lambda: Scaled(np.ones(3)), lambda: Scaled(torch.ones(3)), "another 'by'")])
def test_models_of_another_architecture_are_named(odd, same, message):
    with pytest.raises(ValueError, match=f'model 2 has .*{message}'):
        Stack([same(), same(), odd(), same()])


@pytest.mark.parametrize('bad, message', [
    ([], r'got \[\]'), ([nn.Linear(1, 1), 3], 'got 3'), (None, 'got None'),
    ([nn.Linear(1, 1)] * 2, 'list of 3, got a list of 2'), ([nn.Linear(1, 1)], 'list of 3, got a list of 1')])
def test_lists_that_are_no_stack(bad, message):
    with pytest.raises(ValueError, match=message):
        Stack(bad, 3)


# ---- the two layouts

NETWORKS = dict(
    mnist=(models.mnist_cnn, (1, 28, 28)), digits=(models.digits_cnn, (1, 8, 8)),
    photos=(models.photos_cnn, (3, 16, 16)),
    mlp=(partial(models.mlp, 64), (1, 8, 8)), small=(models.small_resnet, (3, 16, 16)),
    small_group=(partial(models.small_resnet, norm='group'), (3, 16, 16)),
    preact=(models.preact_resnet, (3, 16, 16)),
    preact_group=(partial(models.preact_resnet, norm='group'), (3, 16, 16)),
    resnet18=(models.resnet18, (3, 32, 32)),
    resnet18_group=(partial(models.resnet18, norm='group'), (3, 32, 32)))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def passes(model, nets, batches):
    """Outputs of training and evaluation, gradients and buffers; model: (M, B, ...) inputs -> (M, B, ...)
    outputs."""
    found = []
    for x in batches:
        found.append(model(x))
        (found[-1].float() ** 2).mean((1, 2)).sum().backward()
    for net in nets:
        net.eval()
    with torch.no_grad():
        found.append(model(batches[0]))
    return [f.detach() for f in found]


def one_by_one(nets, batches):
    """The oracle: the modules themselves, without a stack; outputs, and name -> (M, ...) gradients and
    buffers."""
    nets = copy.deepcopy(nets)
    outputs = passes(lambda x: torch.stack([net(xm) for net, xm in zip(nets, x)]), nets, batches)
    grads = {k: torch.stack([dict(net.named_parameters())[k].grad for net in nets])
             for k, _ in nets[0].named_parameters()}
    return outputs, grads, {k: torch.stack([dict(net.named_buffers())[k] for net in nets])
                            for k, _ in nets[0].named_buffers()}


def in_a_stack(stack, batches, bf16=False):
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        outputs = passes(stack, [stack.module], batches)
    return outputs, {k: w.grad.clone()
                     for k, w in stack.weights.items()}, {k: b.clone() for k, b in stack.buffers.items()}


def largest(found, expected):
    "Largest difference, as a share of the largest number of its kind."
    share = lambda a, b: float((a.double() - b.double()).abs().max() / b.double().abs().max())
    outputs = max(share(a, b) for a, b in zip(found[0], expected[0], strict=True))
    joined = [torch.cat([r[1][k].flatten() for k in expected[1]]) for r in (found, expected)]
    assert found[2].keys() == expected[2].keys() and found[1].keys() == expected[1].keys()
    return outputs, share(*joined), max([share(found[2][k], b) for k, b in expected[2].items() if b.any()],
                                        default=0)


def alone_cases():
    for name in NETWORKS:
        for m in (1, 3):
            for layout in ('batch', 'channels'):
                slow = 'resnet18' in name and (name, m, layout) != ('resnet18', 3, 'channels')
                yield pytest.param(name, m, layout, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize('name, m, layout', list(alone_cases()))
def test_a_stack_computes_what_its_models_compute_alone(name, m, layout, double):
    """In float64, where rounding cannot hide or fake a difference; a whole batch, the smaller last one,
    evaluation."""
    make, shape = NETWORKS[name]
    nets, batches = starts(make, m), [torch.randn(m, b, *shape) for b in (5, 3)]
    expected, stack = one_by_one(nets, batches), Stack(nets, layout=layout)
    assert max(largest(in_a_stack(stack, batches), expected)) < 1e-9
    assert stack.layout == ('channels' if m > 1 and layout == 'channels' and name != 'mlp' else 'batch')


@pytest.mark.parametrize('name', ['mnist', 'digits', 'photos', 'small', 'small_group', 'preact_group'])
def test_layouts_agree_in_float32_and_in_bf16(name):
    "Twenty-five models; with many more layers a rounding turns some ReLU, and gradients differ by the turn."
    make, shape = NETWORKS[name]
    m = 25 if name in ('mnist', 'digits', 'small') else 3
    nets, batches = starts(make, m), [torch.randn(m, b, *shape) for b in (12, 5)]
    for bf16, tolerance in (False, 1e-5), (True, 2e-2):
        batch, channels = (in_a_stack(Stack(nets, layout=layout), batches, bf16)
                           for layout in ('batch', 'channels'))
        assert max(largest(channels, batch)) < tolerance


def test_the_layout_changes_neither_state_nor_hashes():
    nets = starts(models.small_resnet, 3)
    batch, channels = Stack(nets), Stack(nets, layout='channels')
    channels(torch.randn(3, 4, 3, 16, 16))
    load_state(channels, state(batch))
    assert list(state(batch)) == list(state(channels)) and hashes(state(batch)) == hashes(state(channels))
    assert torch.equal(batch.flat, channels.flat)


def compiled(f):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.jit.script(f)


@compiled
def centred(x: torch.Tensor): return x - x.mean(1, keepdim=True)


@compiled
def separate(x: torch.Tensor): return x.sigmoid() * x


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x - x.mean(1, keepdim=True)

    @staticmethod
    def backward(ctx, g): return g - g.mean(1, keepdim=True)


class Own(nn.Module):
    "Two convolutions around code of its own."
    def __init__(self, how, out=8):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3,
                                            padding=1), nn.Conv2d(6, out, 3, groups=2, dilation=2, bias=False)
        self.end, self.how = nn.Sequential(nn.Flatten(), nn.Linear(out * 16, 2)), how

    def forward(self, x): return self.how(self, x)


def in_place(net, x):
    x = net.first(x)
    x += x.relu()
    return net.end(net.second(F.relu(x, inplace=True) - x / 2))


SEPARATE = dict(
    residual=lambda net, x: net.end(net.second(net.first(x) + 1).relu() * 2), in_place=in_place,
    pools=lambda net, x: net.end(net.second(F.avg_pool2d(F.max_pool2d(net.first(x), 3, 1, 1), 3, 1, 1))),
    dropout=lambda net, x: net.end(net.second(F.dropout(net.first(x), 0., net.training))),
    attribute=lambda net, x: net.end(net.second(net.first(x).to(x.dtype))),
    compiled=lambda net, x: net.end(net.second(separate(net.first(x)))))
TOGETHER = dict(
    flatten=lambda net, x: net.end[1](torch.flatten(net.second(net.first(x)), 1)),
    view=lambda net, x: net.end[1](net.second(net.first(x)).view(len(x), -1)),
    own_flatten=lambda net, x: net.end[1](net.second(net.first(x)).flatten(1)),
    mean_of_channels=lambda net, x: net.end(net.second(net.first(x) - net.first(x).mean(1, keepdim=True))),
    softmax=lambda net, x: net.end(net.second(net.first(x).softmax(1))),
    maximum=lambda net, x: net.end(
        net.second(net.first(x) / net.first(x).amax(1, keepdim=True).abs().clamp(min=1))),
    most=lambda net, x: net.end(net.second(net.first(x) - net.first(x).max(1, keepdim=True)[0])),
    join=lambda net, x: net.end(net.second(torch.cat([net.first(x)[:, :3], x], 1))),
    swap=lambda net, x: net.end(net.second(net.first(x).roll(1, 1))),
    count=lambda net, x: net.end(net.second(net.first(x) / x.shape[1])),
    count_of_features=lambda net, x: net.end(net.second(net.first(x) / net.first(x).numel() * len(x))),
    transpose=lambda net, x: net.end(net.second(net.first(x).transpose(2, 3))),
    shuffle=lambda net, x: net.end(net.second(F.channel_shuffle(net.first(x), 2))),
    norm=lambda net, x: net.end(net.second(F.layer_norm(net.first(x), (6, 8, 8)))),
    operator=lambda net, x: net.end((net.second(net.first(x)).mT @ net.second(net.first(x)))))


@pytest.mark.parametrize('how', [*SEPARATE, *TOGETHER])
def test_code_of_its_own_is_right_in_the_layout_it_gets(how, double):
    nets = starts(lambda: Own((SEPARATE | TOGETHER)[how]), 3)
    batches = [torch.randn(3, b, 3, 8, 8) for b in (6, 3)]
    stack = Stack(nets, layout='channels')
    assert max(largest(in_a_stack(stack, batches), one_by_one(nets, batches))) < 1e-9
    assert stack.layout == ('channels' if how in SEPARATE else 'batch'), stack.obstacle
    check_independence(nets[0], torch.randn(4, 3, 8, 8), 'channels')


class Convolutions(nn.Module):
    "Its outputs are images, or the average of images by its own code."
    def __init__(self, average):
        super().__init__()
        self.conv, self.average = nn.Conv2d(3, 2, 3), average

    def forward(self, x): return self.conv(x).mean((2, 3)) if self.average else self.conv(x)


@pytest.mark.parametrize('make, shape, why', [
    (partial(Convolutions, True), (3, 8, 8), 'mean of images'),
    (partial(Convolutions, False), (3, 8, 8), 'its outputs are images'),
    (partial(models.mlp, 192), (3, 8, 8), 'no convolution'),
    (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU()), (5,), 'are no images'),
    (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.LayerNorm(6)), (3, 8, 8), 'no stacked counterpart'),
    (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Linear(6, 2), nn.Flatten()), (3, 8, 8),
     'nn.Linear of images'),
    (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.Flatten()),
     (3, 8, 8), 'Invalid channel'),
    (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(2), nn.Flatten()), (3, 8, 8), 'flatten of images')])
def test_what_stands_in_the_way_is_named(make, shape, why, double):
    nets, x = starts(make, 3), torch.randn(3, 6, *shape)
    assert why in obstacle(nets[0], shape)
    stack = Stack(nets, layout='channels')
    assert torch.allclose(stack(x), torch.stack([net(xm) for net, xm in zip(nets, x)]), atol=1e-12)
    assert stack.layout == 'batch'


class Viewing(nn.Module):
    "Flattens its images by `view`, after whatever comes after the convolution."
    def __init__(self, after=nn.Identity):
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 4, 3), after()
        self.drop, self.out = nn.Dropout(0.), nn.Linear(144, 2)

    def forward(self, x): return self.out(self.drop(self.after(self.conv(x))).view(x.size(0), -1))


@pytest.mark.parametrize('after',
                         [nn.Identity, nn.ReLU, partial(nn.BatchNorm2d, 4), partial(nn.GroupNorm, 2, 4),
                          partial(nn.MaxPool2d, 3, 1, 1), partial(nn.LayerNorm, 6)])
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('m, folded, layout',
                         [(1, False, 'batch'), (1, True, 'batch'), (3, False, 'batch'),
                          (3, False, 'channels')])
def test_view_works_in_a_stack_as_it_does_alone(after, last, m, folded, layout, double):
    nets, batches = starts(partial(Viewing, after), m), [torch.randn(m, b, 3, 8, 8) for b in (5, 3)]
    expected = one_by_one(nets, batches)
    if last:
        batches = [x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (m, -1))
                   for x in batches]
    assert max(largest(in_a_stack(Stack(nets, folded=folded, layout=layout), batches), expected)) < 1e-9
    check_independence(nets[0], batches[0][0], layout)


def caught(net, x):
    try:
        return net.end(net.second(net.first(x).roll(1, 1)))
    except TypeError:
        return net.end(net.second(net.first(x)))


def asserting(net, x):
    assert x.shape[1] == 3
    return net.end(net.second(net.first(x)))


@pytest.mark.parametrize('how',
                         [lambda net, x: net.end(net.second(centred(net.first(x)))),
                          lambda net, x: net.end(net.second(Centred.apply(net.first(x)))), caught, asserting])
def test_code_that_hides_from_the_trial_keeps_the_batch(how, double):
    nets, x = starts(lambda: Own(how), 3), torch.randn(3, 6, 3, 8, 8)
    stack = Stack(nets, layout='channels')
    assert torch.allclose(stack(x), torch.stack([net(xm) for net, xm in zip(nets, x)]), atol=1e-12)
    assert stack.layout == 'batch'
    assert stack.obstacle


def test_the_trial_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(72, 1))
    stack, before, draws = Stack(net, 2,
                                 layout='channels'), state(Stack(net, 2)), torch.random.get_rng_state()
    stack.module.eval()
    stack(torch.randn(2, 4, 3, 8, 8, generator=torch.Generator()))
    assert hashes(state(stack)) == hashes(before) and torch.equal(draws, torch.random.get_rng_state())
    assert not stack.module.training and stack.layout == 'channels'


def test_layouts_are_named_and_hooks_keep_the_batch():
    with pytest.raises(ValueError, match="layout must be 'batch' or 'channels', got 'rows'"):
        Stack(models.digits_cnn(), 2, layout='rows')
    with pytest.raises(ValueError, match="use layout='batch'"):
        Stack(models.digits_cnn(), 2, folded=True, layout='channels')


def test_the_faster_layout_is_the_one_that_takes_less_time(monkeypatch):
    clock = dict(batch=3., channels=1.)
    def timed(slow):
        now = [0.]
        def make(layout):
            stack = Stack(models.digits_cnn(), 2, layout=layout)
            real = stack.module.forward
            def forward(x):
                now[0] += clock[layout] if (layout == 'batch') == slow else 2.
                return real(x)
            stack.module.forward = forward
            return stack
        monkeypatch.setattr(stacked.time, 'perf_counter', lambda: now[0])
        return faster_layout(make, torch.rand(2, 3, 1, 8, 8))
    assert timed(True) == 'channels' and timed(False) == 'channels'
    clock.update(batch=1., channels=3.)
    assert timed(True) == 'batch' and timed(False) == 'batch'


# ---- no host synchronisation, no shape that depends on values

@pytest.mark.parametrize('layout', ['batch', 'channels'])
@pytest.mark.parametrize('name', NETWORKS)
def test_a_step_runs_without_numbers(name, layout):
    make, shape = NETWORKS[name]
    stack = Stack(make(), 3, 'meta', layout=layout)
    for b in (4, 3):
        out = stack(torch.empty(3, b, *shape, device='meta'))
        out.square().sum().backward()
        assert out.shape == (3, b, 1)
    assert stack.layout == ('batch' if name == 'mlp' else layout)
    assert all(w.grad.is_meta and w.grad.untyped_storage()._cdata == stack.flat.grad.untyped_storage()._cdata
               for w in stack.weights.values())


class NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise AssertionError(f'{func} waits for the device')
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('layout', ['batch', 'channels'])
@pytest.mark.parametrize('name', ['mnist', 'small', 'small_group', 'mlp'])
def test_a_step_in_bf16_reads_nothing_back(name, layout):
    make, shape = NETWORKS[name]
    stack, x = Stack(make(), 3, layout=layout), torch.randn(3, 4, *shape)
    with NoReading(), torch.autocast('cpu', torch.bfloat16):
        stack(x).float().square().sum().backward()
    with NoReading(), pytest.raises(AssertionError, match='waits'):
        x.sum().item()


# ---- group normalisation keeps the precision of its input

@pytest.mark.parametrize('layout', ['batch', 'channels'])
def test_group_norm_under_autocast_is_bf16_and_float32_as_before(layout):
    torch.manual_seed(0)
    layer, x = stacked.StackedGroupNorm(nn.GroupNorm(2, 4)), torch.randn(3 * 5, 4, 6, 6)
    layer.weight, layer.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    weight, bias = (w[:, None, :, None, None] for w in (layer.weight, layer.bias))
    expected = (F.group_norm(x, 2).unflatten(0, (3, 5)) * weight + bias).flatten(0, 1)
    if layout == 'channels':
        layer.models_in_channels = True
        x = stacked.to_channels(x, 3)
    back = (lambda t: stacked.to_batch(t, 3)) if layout == 'channels' else lambda t: t
    exact = back(layer(x))
    assert torch.equal(exact, expected) if layout == 'batch' else torch.allclose(exact, expected, atol=1e-5)
    for rounded in (x.bfloat16(), x.bfloat16().contiguous(memory_format=torch.channels_last)):
        with torch.autocast('cpu', torch.bfloat16):
            out = layer(rounded)
        assert out.dtype == torch.bfloat16 and out.stride() == rounded.stride()
        assert (back(out).float() - expected).abs().max() < 2 ** -6 * expected.abs().max()


@pytest.mark.parametrize('layout', ['batch', 'channels'])
def test_activations_of_a_group_norm_network_stay_bf16(layout):
    stack, seen = Stack(models.small_resnet(norm='group'), 2, layout=layout), set()
    for layer in stack.module.modules():
        layer.register_forward_hook(lambda layer, args, out: seen.add((args[0].dtype, out.dtype)))
    with torch.autocast('cpu', torch.bfloat16):
        stack(torch.randn(2, 3, 3, 16, 16).bfloat16())
    assert seen == {(torch.bfloat16, torch.bfloat16)}


# ---- what must not be stacked

def to_tf32(t):
    "Ten bits of the mantissa, rounded to nearest."
    return ((t.view(torch.int32) + 0x1000) & ~0x1fff).view(torch.float32)


def convolve(x, w, *args, real=F.conv2d): return real(to_tf32(x.contiguous()), to_tf32(w.contiguous()), *args)


@pytest.fixture
def tf32(monkeypatch):
    "Convolutions as cuDNN computes them by default, products in float32."
    monkeypatch.setattr(F, 'conv2d', convolve)


@pytest.fixture
def tf32_unless_off(monkeypatch):
    real = F.conv2d
    monkeypatch.setattr(F, 'conv2d',
                        lambda *args: (convolve if torch.backends.cudnn.allow_tf32 else real)(*args))


SLOW = 'preact', 'preact_group', 'resnet18', 'resnet18_group'


@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NETWORKS])
def test_tf32_is_not_taken_for_mixing(name, tf32):
    "Forty initialisations, and the switches that would turn TF32 off without effect."
    make, shape = NETWORKS[name]
    for seed in range(40):
        torch.manual_seed(seed)
        check_independence(make(), torch.rand(4, *shape))


@pytest.mark.parametrize('name', ['mnist', 'small', 'small_group'])
def test_tf32_is_off_while_the_channels_are_checked(name, tf32_unless_off):
    make, shape = NETWORKS[name]
    for seed in range(5):
        torch.manual_seed(seed)
        check_independence(make(), torch.rand(4, *shape), 'channels')


def test_the_simulated_tf32_is_coarse_enough_to_matter(tf32):
    "The comparison that the check made before, of a convolution with a product, fails."
    def same(seed):
        torch.manual_seed(seed)
        net, x = models.small_resnet().eval(), torch.rand(1, 4, 3, 16, 16)
        with torch.no_grad():
            return stacked._close(Stack(net, 2)(x.expand(2, 4, 3, 16, 16))[:1], Stack(net)(x))
    assert not all(same(seed) for seed in range(40))


SWITCHES = """
import os, sys, torch
from rab_nb.stacked import ieee_float32
b = torch.backends
two = hasattr(b.cudnn, 'conv')
NAMES = ['b.cudnn.allow_tf32', 'b.cuda.matmul.allow_tf32', 'torch.get_float32_matmul_precision()']
parts = ('cuda.matmul', 'cudnn.conv', 'cudnn.rnn', 'mkldnn.matmul', 'mkldnn.conv')
NAMES += [f'b.{name}.fp32_precision' for name in parts if two]

def read(name):
    try: return eval(name)
    except RuntimeError: return 'mixed'

def case(before):
    default = [read(name) for name in NAMES]
    exec(before)
    values = [read(name) for name in NAMES]
    try:
        with ieee_float32():
            inside = [read(name) for name in NAMES]
            raise KeyError
    except KeyError: pass
    assert [read(name) for name in NAMES] == values, (values, [read(name) for name in NAMES])
    if 'mixed' not in values: assert inside[:3] == [False, False, 'highest'], inside
    assert not {'tf32', 'bf16'} & set(inside[3:]), inside
    if values == default and two:
        b.fp32_precision = 'tf32'
        assert read('b.cuda.matmul.fp32_precision') == 'tf32'

for before in sys.argv[1:]:
    if 'fp32' in before and not two: continue
    if not (child := os.fork()):
        case(before)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, before
"""


def test_switches_of_float32_are_off_inside_and_as_before_afterwards():
    cases = ['', 'b.cudnn.allow_tf32 = False', 'b.cuda.matmul.allow_tf32 = True',
             "torch.set_float32_matmul_precision('high')",
             "torch.set_float32_matmul_precision('medium')", "b.fp32_precision = 'tf32'",
             "b.cudnn.conv.fp32_precision = 'ieee'",
             "b.cuda.matmul.fp32_precision = 'tf32'", "b.mkldnn.matmul.fp32_precision = 'bf16'"]
    subprocess.run([sys.executable, '-W', 'ignore', '-c', SWITCHES, *cases], check=True, timeout=120)


class Part(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x): return self.how(self, x)


def four(self, x):
    assert len(x) == 4
    return x


REASONS = [
    (four, None),
    (lambda self, x: x - x.mean(0), 'MIXES'),
    (lambda self, x: x[torch.randperm(len(x))] if self.training else x, 'MIXES'),
    (lambda self, x: x.flip(0) + x if self.training else x, 'MIXES'),
    (lambda self, x: F.dropout(x), 'DRAWS'), (lambda self, x: x + torch.randn_like(x), 'DRAWS'),
    (lambda self, x: x + np.random.rand(), 'DRAWS'),
    (lambda self, x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), 'DRAWS'),
    (lambda self, x: x + np.random.rand() if self.training else x, 'DRAWS'),
    (lambda self, x: x / x.max().item(), 'READS'), (lambda self, x: x * float(x.sum()), 'READS'),
    (lambda self, x: x if x.sum() < 8 else -x, 'READS'),
    (lambda self, x: x / x.max().item() if self.training else x, 'READS'),
    (lambda self, x: x if x.isfinite().all() else x / 0, 'READS'),
    (lambda self, x: x * float(torch.tensor(2.)), 'READS'),
    (lambda self, x: x[x.sum(1) > 0][:4] if len(x) > 4 else x, 'MIXES'),
    (lambda self, x: x if len(x) == 4 else 1 / 0, None), (lambda self, x: x if len(x) == 4 else [][0], None)]


@pytest.mark.parametrize('how, why', REASONS)
def test_the_reason_why_a_module_cannot_be_stacked_is_the_right_one(how, why):
    net = nn.Sequential(Part(how), nn.Linear(5, 1))
    with pytest.raises(ValueError,
                       match=r'(?s)cannot stack 0 \(Part\): .*train one model at a time with stack=1') as e:
        check_independence(net, torch.rand(4, 5))
    named = [r for r in ('MIXES', 'DRAWS', 'READS', 'ALTERS') if getattr(stacked, f'_{r}') in str(e.value)]
    assert named == ([why] if why else [])


@pytest.mark.parametrize('how', [
    lambda self, x: F.dropout(x, training=self.training),
    lambda self, x: x + torch.randn_like(x) if self.training else x,
    lambda self, x: F.normalize(x), lambda self, x: x[torch.arange(len(x))] * x.shape[1]])
def test_what_treats_samples_separately_is_stacked(how):
    check_independence(nn.Sequential(Part(how), nn.Linear(5, 1)), torch.rand(4, 5))


class Elsewhere(nn.Module):
    "Uses the weights of a layer outside of it."
    def __init__(self, how):
        super().__init__()
        self.fc, self.how = nn.Linear(5, 5), how

    def forward(self, x): return self.how(self.fc, x)


@pytest.mark.parametrize('how', [
    lambda fc, x: fc(x) * fc.weight.mean(), lambda fc, x: fc(x) * fc.weight.abs().max(),
    lambda fc, x: fc(x) / fc.weight.norm(), lambda fc, x: F.linear(fc(x), fc.weight.mT),
    lambda fc, x: fc(x) + fc.bias[0]])
def test_weights_used_outside_of_their_layer_are_found(how):
    with pytest.raises(ValueError, match=r'cannot stack the module itself \(Elsewhere\)'):
        check_independence(Elsewhere(how), torch.rand(4, 5))


def doubled(layer):
    layer.register_forward_hook(lambda layer, args, out: 2 * out)
    return layer


def own_forward(layer):
    layer.forward = lambda x: F.linear(x, layer.weight)
    return layer


def halved(layer):
    layer.register_forward_pre_hook(lambda layer, args: args[0] / 2)
    return layer


@pytest.mark.parametrize('change',
                         [doubled, halved, lambda layer: nn.utils.parametrizations.weight_norm(layer)])
def test_a_layer_that_does_more_than_its_class_is_not_replaced(change, double):
    nets, x = starts(lambda: nn.Sequential(change(nn.Linear(5, 4)), nn.Linear(4, 1)), 3), torch.randn(3, 6, 5)
    assert torch.allclose(Stack(nets)(x), torch.stack([net(xm) for net, xm in zip(nets, x)]), atol=1e-12)


def test_a_layer_with_a_forward_of_its_own_is_named():
    assert stacked.stacked_layer(own_forward(nn.Linear(5, 4))) is None


def test_the_check_changes_nothing():
    net, draws = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(),
                               nn.Linear(72, 1)), torch.random.get_rng_state()
    before = copy.deepcopy(net.state_dict())
    check_independence(net, torch.linspace(0, 1, 768).view(4, 3, 8, 8))
    assert net.training and torch.equal(draws, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
