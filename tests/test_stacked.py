"Stacks of models against the models one by one"
import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

from rab_nb import models
from rab_nb.stacked import Stack, hashes, state


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
    (models.digits_cnn, (1, 8, 8)), (lambda: models.small_resnet(), (3, 16, 16)), (lambda: models.small_resnet(norm='group'), (3, 16, 16)),
    (lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 1)), (1, 8, 8))])
@pytest.mark.parametrize('m', [1, 3])
@pytest.mark.parametrize('folded', [False, True])
def test_every_model_has_its_own_start(make, shape, m, folded):
    nets, x = starts(make, m), torch.rand(m, 5, *shape)
    for net in nets:
        for _ in range(3): net(3 * torch.randn(8, *shape))  # running averages of its own
    stack = Stack([copy.deepcopy(net) for net in nets], folded=folded)
    for k, net in enumerate(nets):
        expected = dict([*net.named_parameters(), *net.named_buffers()])
        assert list(expected) == list(state(stack))
        for name, t in state(stack).items(): assert torch.equal(t[k], expected[name])
        assert hashes({k: v.detach()[None] for k, v in expected.items()})[0] == hashes(state(stack))[k]
    stack.module.eval()
    for k, net in enumerate(nets): assert torch.allclose(stack(x)[k], net.eval()(x[k]), atol=1e-5)


def test_starts_are_copied():
    nets = starts(models.small_resnet, 2)
    before = hashes(state(Stack(nets)))
    for m in (1, 2):
        stack = Stack(nets[:m])
        stack(torch.rand(m, 4, 3, 16, 16)).sum().backward()
        with torch.no_grad(): stack.flat += 1
    assert hashes(state(Stack(nets))) == before and all(p.grad is None for net in nets for p in net.parameters())


def frozen(net):
    net[0].weight.requires_grad_(False)
    return net


def tied(yes):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if yes: net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize('odd, same, message', [
    (lambda: models.digits_cnn(width=8), models.digits_cnn, r"parameter '0.weight' of shape \(8, 1, 2, 2\) and torch.float32 where model 0 has parameter '0.weight' of shape \(16, 1, 2, 2\)"),
    (lambda: nn.Sequential(nn.Linear(2, 1, bias=False)), lambda: nn.Sequential(nn.Linear(2, 1)), "nothing where model 0 has parameter '0.bias'"),
    (lambda: nn.Sequential(nn.Linear(2, 1)).double(), lambda: nn.Sequential(nn.Linear(2, 1)), 'float64 where'),
    (lambda: frozen(models.digits_cnn()), models.digits_cnn, 'frozen where'),
    (lambda: tied(True), lambda: tied(False), "the same tensor as '0.weight' where"),
    (lambda: models.small_resnet(norm='group'), models.small_resnet, "where model 0 has buffer '1.norm1.running_mean'"),
    (lambda: nn.Sequential(nn.Linear(2, 1), nn.ReLU()), lambda: nn.Sequential(nn.Linear(2, 1), nn.Tanh()), r"'  \(1\): ReLU\(\)' where model 0 has '  \(1\): Tanh\(\)'"),
    (lambda: Scaled(2.), lambda: Scaled(1.), "another 'by' in the module itself"),
    (lambda: Scaled(torch.ones(3)), lambda: Scaled(torch.zeros(3)), "another 'by'"),
    (lambda: Scaled(np.ones(3)), lambda: Scaled(torch.ones(3)), "another 'by'")])
def test_models_of_another_architecture_are_named(odd, same, message):
    with pytest.raises(ValueError, match=f'model 2 has .*{message}'): Stack([same(), same(), odd(), same()])


@pytest.mark.parametrize('bad, message', [
    ([], r'got \[\]'), ([nn.Linear(1, 1), 3], 'got 3'), (None, 'got None'), ([nn.Linear(1, 1)] * 2, 'list of 3, got a list of 2'), ([nn.Linear(1, 1)], 'list of 3, got a list of 1')])
def test_lists_that_are_no_stack(bad, message):
    with pytest.raises(ValueError, match=message): Stack(bad, 3)
