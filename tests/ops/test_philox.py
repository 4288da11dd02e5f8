"""Philox against published words, and against an independent one that numpy's own confirms."""

import numpy as np
import pytest
import torch

from megachat.ops.philox import philox_words, uniforms

WORDS = {
    # Known answers of Random123 for philox4x32, 10 rounds: counter, key, words.
    "zeros": ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
CONSTANTS = {
    32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
    64: ((0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)),
}


def _philox(counter: tuple[int, ...], key: tuple[int, ...], *, bits: int) -> tuple[int, ...]:
    """Ten rounds on words of either width, in Python's integers."""
    multipliers, steps = CONSTANTS[bits]
    mask = 2**bits - 1
    for _ in range(10):
        high, low = zip(
            *(divmod(m * c, 2**bits) for m, c in zip(multipliers, counter[::2], strict=True)),
            strict=True,
        )
        counter = (high[1] ^ counter[1] ^ key[0], low[1], high[0] ^ counter[3] ^ key[1], low[0])
        key = tuple((word + step) & mask for word, step in zip(key, steps, strict=True))
    return counter


@pytest.mark.parametrize("name", WORDS)
def test_known_words_come_out(name: str) -> None:
    counter, key, expected = WORDS[name]
    words = philox_words(
        tuple(torch.tensor(word) for word in key), tuple(torch.tensor(word) for word in counter)
    )
    assert tuple(int(word) for word in words) == expected == _philox(counter, key, bits=32)


def test_the_rounds_of_the_oracle_are_those_of_numpy() -> None:
    """Numpy has the 64-bit variant, whose rounds are the same but for width and constants."""
    key, counter = (123, 2**63 + 5), (7, 0, 2**64 - 1, 9)
    theirs = np.random.Philox(
        counter=np.array(counter, dtype=np.uint64), key=np.array(key, dtype=np.uint64)
    ).random_raw(4)
    stepped = (counter[0] + 1, *counter[1:])  # numpy counts before it draws
    assert tuple(int(word) for word in theirs) == _philox(stepped, key, bits=64)


def test_random_counters_and_keys_agree_with_the_oracle() -> None:
    numbers = np.random.default_rng(0).integers(0, 2**32, (50, 6))
    columns = torch.from_numpy(numbers).t()
    found = torch.stack(philox_words(tuple(columns[:2]), tuple(columns[2:])), dim=1)
    expected = [_philox(tuple(row[2:]), tuple(row[:2]), bits=32) for row in numbers.tolist()]
    assert found.tolist() == [list(words) for words in expected]


def test_a_stretch_of_a_stream_is_the_same_however_it_is_cut() -> None:
    keys = torch.tensor([5, -(2**62) - 1, 2**63 - 1])
    positions = torch.tensor([0, 7, 2**32 - 1])
    whole = uniforms(keys, positions=positions, stream=3, first=0, count=40)
    assert torch.equal(
        whole[:, 13:31], uniforms(keys, positions=positions, stream=3, first=13, count=18)
    )
    assert torch.equal(
        whole[1:2], uniforms(keys[1:2], positions=positions[1:2], stream=3, first=0, count=40)
    )
    streams = torch.tensor([1, 3, 2])
    mixed = uniforms(keys, positions=positions, stream=streams, first=0, count=40)
    assert torch.equal(mixed[1], whole[1]) and not torch.equal(mixed[0], whole[0])


def test_numbers_follow_from_words_and_lie_inside_the_unit_interval() -> None:
    key = 2**40 + 17
    (row,) = uniforms(
        torch.tensor([key]), positions=torch.tensor([6]), stream=2, first=4, count=4
    ).tolist()
    words = _philox((1, 2, 6, 0), (key % 2**32, key >> 32), bits=32)
    assert row == [(word + 0.5) / 2**32 for word in words]
    assert all(0 < number < 1 for number in row)


def test_numbers_are_uniform_and_differ_between_keys_positions_and_streams() -> None:
    keys, positions = torch.arange(100), torch.zeros(100, dtype=torch.int64)
    base = uniforms(keys, positions=positions, stream=0, first=0, count=1000)
    counts = np.histogram(base.numpy(), bins=50, range=(0, 1))[0]
    expected = base.numel() / 50
    assert ((counts - expected) ** 2 / expected).sum() < 49 + 4 * np.sqrt(2 * 49)
    for other in (
        uniforms(keys + 1, positions=positions, stream=0, first=0, count=1000),
        uniforms(keys, positions=positions + 1, stream=0, first=0, count=1000),
        uniforms(keys, positions=positions, stream=1, first=0, count=1000),
    ):
        correlation = np.corrcoef(base.flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(base.numel())
