"Streams: no two addresses share a state, the numbers are those of the Mersenne Twister, and they travel."
import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import rab_nb.noise as noise
from rab_nb.noise import GaussianNoise, LaplaceNoise, UniformNoise, generator, global_stream, rng, stream


def bits(g):
    "A generator's state, whole."
    return g.get_state().numpy().tobytes()


def words(g):
    "The Mersenne Twister's 624 words, read from torch's record by offsets counted in its source."
    return np.frombuffer(bits(g)[24:24 + 8 * 624], np.uint64)


def low_bits_agree(n=60_000):
    "Two addresses that torch.manual_seed could not tell apart."
    seen = {}
    for k in range(n):
        if (low := stream(0, 'train-noise', k) & 0xffffffff) in seen: return seen[low], k
        seen[low] = k


def test_addresses_that_agree_in_32_bits_have_their_own_numbers():
    a, b = low_bits_agree()
    old = [torch.randn(50, generator=torch.Generator().manual_seed(stream(0, 'train-noise', k)))
           for k in (a, b)]
    assert torch.equal(*old)
    new = [torch.randn(50_000, generator=generator(0, 'train-noise', k)) for k in (a, b)]
    assert abs(np.corrcoef(*map(torch.Tensor.numpy, new))[0, 1]) < 4 / 50_000**.5
    assert (words(generator(0, 'train-noise', a)) != words(generator(0, 'train-noise', b))).mean() > .99


@pytest.mark.parametrize('shift', [2**32, 2**63, 2**64, 2**128, -2**32])
def test_seeds_that_agree_modulo_a_power_of_two_differ(shift):
    for seed in (0, 1, 12345):
        assert (words(generator(seed, 'init')) != words(generator(seed + shift, 'init'))).mean() > .99
        assert rng(seed, 'init').random() != rng(seed + shift, 'init').random()


def test_no_two_of_a_million_addresses_share_their_state():
    # The first 128 bits of each state; that they are the state's is the next test.
    seen = set()
    for seed, purpose in ((0, 'train-noise'), (2**32, 'train-noise'), (0, 'dp-noise'), (0, 'start')):
        seen.update(noise._words(noise._address(seed, purpose, (k, row)), 4).tobytes() for k in range(500)
                    for row in range(500))
    assert len(seen) == 10**6


def test_full_states_of_some_hundred_addresses():
    drawn = np.stack([words(generator(s, 'start', k)) for s in (0, 7) for k in range(200)])
    for s in (0, 7):
        for k in range(200):
            assert (noise._words(noise._address(s, 'start', (k,)), 4) == drawn[k + 200 * (s == 7)][:4]).all()
    assert len(np.unique(drawn)) > drawn.size - 20  # 249,600 words of 32 bits: 7 coincidences are expected
    share = np.unpackbits(drawn.astype('<u4').view('u1')).mean()
    assert abs(share - .5) < 4 * .5 / (32 * drawn.size)**.5


@pytest.mark.slow
def test_generators_of_a_million_addresses_differ_in_their_whole_state():
    seen = {hashlib.blake2b(bits(generator(s, 'train-noise', k)), digest_size=16).digest() for s in range(100)
            for k in range(10_000)}
    assert len(seen) == 10**6


def test_numpy_draws_the_same_twister():
    words = np.frombuffer(hashlib.shake_256(b"(3, 'init', 5)").digest(2496), '<u4')
    twister = np.random.MT19937()
    twister.state = dict(bit_generator='MT19937', state=dict(key=words, pos=624))
    expected = twister.random_raw(5000) & 0xffff
    assert (torch.randint(2**16, (5000,), generator=generator(3, 'init', 5)).numpy() == expected).all()


def test_numpy_streams_use_all_bits_of_the_hash():
    entropy = int.from_bytes(hashlib.sha256(b"(3, 'split')").digest(), 'little')
    expected = np.random.default_rng(np.random.SeedSequence(entropy, pool_size=8)).random(5)
    assert (rng(3, 'split').random(5) == expected).all()
    states = [rng(s, 'split', k).bit_generator.state['state'] for s in range(20) for k in range(500)]
    assert len({s['state'] for s in states}) == len({s['inc'] for s in states}) == 10_000


@pytest.mark.parametrize('law', [GaussianNoise(2.), UniformNoise(-1., 3.), LaplaceNoise(.5)], ids=repr)
def test_numbers_follow_their_law_within_and_across_streams(law):
    cdf = law.law([0.]).components[0].cdf
    rows = np.stack([law.sample((2000,), generator(0, 'train-noise', k)).numpy() for k in range(300)])
    assert stats.kstest(rows.ravel(), cdf).pvalue > 1e-4
    assert stats.kstest(rows[:, 0], cdf).pvalue > 1e-4  # the first number of every stream
    # neighbours in a stream, neighbouring streams
    for a, b in ((rows[:, :-1], rows[:, 1:]), (rows[:-1], rows[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / a.size**.5
    assert np.abs(np.corrcoef(rows) - np.eye(300)).max() < 5.5 / 2000**.5


def test_a_stream_is_the_same_in_a_copy_and_in_another_process():
    drawn = torch.randn(1000, generator=generator(3, 'test-noise', 8))
    assert torch.equal(torch.randn(1000, generator=pickle.loads(pickle.dumps(generator(3, 'test-noise', 8)))),
                       drawn)
    ask = ("import torch, hashlib; from rab_nb.noise import generator, rng; "
           "print(hashlib.sha256(torch.randn(1000, generator=generator(3, 'test-noise', "
           "8)).numpy().tobytes()).hexdigest(), rng(3, 'x').random())")
    there = subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True,
                           check=True).stdout.split()
    assert there == [hashlib.sha256(drawn.numpy().tobytes()).hexdigest(), str(rng(3, 'x').random())]


def test_the_global_generator_is_lent_and_given_back():
    torch.manual_seed(5)
    torch.randn(3)  # an odd number of normal numbers leaves one over, which is part of the state too
    before = torch.get_rng_state()
    with global_stream(0, 'start', 7):
        drawn = torch.rand(9)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(9, generator=generator(0, 'start', 7)))
    with pytest.raises(KeyError), global_stream(0, 'start', 7):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    with global_stream(0, 'start', 7), global_stream(0, 'start', 8):
        pass
    a, b = low_bits_agree()
    with global_stream(0, 'train-noise', a):
        first = torch.nn.Linear(20, 20).weight.detach()
    with global_stream(0, 'train-noise', b):
        second = torch.nn.Linear(20, 20).weight.detach()
    assert not torch.isclose(first, second).any()


def test_dropout_follows_the_stream():
    layer, x = torch.nn.Dropout(.5), torch.ones(200)
    def dropped(k):
        with global_stream(0, 'layers', k):
            return layer(x)
    assert torch.equal(dropped(1), dropped(1)) and not torch.equal(dropped(1), dropped(2))


def test_what_a_gpu_generator_is_given():
    offsets = [noise._philox_offset(noise._words(noise._address(0, 'x', (k,)), 2)) for k in range(2000)]
    assert all(o % 4 == 0 and 0 <= o < 2**62 for o in offsets) and len(set(offsets)) == 2000
    assert noise._philox_offset((2**32 - 1, 2**32 - 1)) == 2**62 - 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_streams_of_a_gpu():
    g = generator(0, 'x', 3, device='cuda')
    assert g.initial_seed() == stream(0, 'x', 3)
    assert g.get_offset() == noise._philox_offset(noise._words(noise._address(0, 'x', (3,)), 2))
    a, b = low_bits_agree()
    first, second = (torch.randn(50_000, generator=generator(0, 'train-noise', k, device='cuda'),
                                 device='cuda').cpu().numpy() for k in (a, b))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / 50_000**.5
    assert stats.kstest(first, 'norm').pvalue > 1e-4
    before = torch.cuda.get_rng_state()
    with global_stream(0, 'x', 3, device='cuda'):
        drawn = torch.rand(1000, device='cuda')
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(1000, device='cuda', generator=generator(0, 'x', 3, device='cuda')))


@pytest.mark.parametrize('seed, index',
                         [(0., ()), (0, (1.5,)), (None, ()), ('0', ()), (0, (np.float32(1),)),
                          (0, (np.array([1, 2]),))], ids=repr)
def test_an_address_of_other_than_whole_numbers_is_refused(seed, index):
    for draw in (stream, generator, rng):
        with pytest.raises(ValueError, match='whole numbers'):
            draw(seed, 'x', *index)
    with pytest.raises(ValueError, match='whole numbers'), global_stream(seed, 'x', *index):
        pass


def test_whole_numbers_of_any_kind_name_the_same_stream():
    of_numpy, of_torch = stream(np.int64(3), 'x', np.uint8(1)), stream(torch.tensor(3), 'x', torch.tensor(1))
    assert stream(3, 'x', 1) == of_numpy == of_torch == stream(3, 'x', True)


def test_another_layout_of_the_state_is_refused(monkeypatch):
    shifted = np.dtype([('seed', 'u8'), ('seeded', 'i4'), ('left', 'i4'), ('next', 'u8'),
                        ('words', '>u8', 624), ('normals', 'u1', 40)])
    for layout in (shifted,
                   np.dtype([(n, noise._TWISTER[n]) for n in noise._TWISTER.names[:-1]]
                            + [('normals', 'u1', 48)])):
        monkeypatch.setattr(noise, '_TWISTER', layout)
        noise._check_twister.cache_clear()
        with pytest.raises(RuntimeError, match=r'torch .* another layout'):
            generator(0, 'x')
    monkeypatch.undo()
    noise._check_twister.cache_clear()
    generator(0, 'x')
