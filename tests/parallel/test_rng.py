import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.parallel.rng import generator_for, seed_for

PART = st.one_of(st.integers(), st.text(alphabet=st.characters(exclude_characters="\x1f")))
PARTS = st.lists(PART, min_size=1, max_size=5)


def test_seeds_are_the_same_on_every_machine_and_in_every_version() -> None:
    assert seed_for(1, "init", "layers.0.qkv.weight") == 4473890741362211844
    assert seed_for() == 6510301506637419378


@given(PARTS, PARTS)
@settings(deadline=None)
def test_every_part_its_type_and_its_place_count(
    one: list[int | str], other: list[int | str]
) -> None:
    assert (seed_for(*one) == seed_for(*other)) == (one == other)


@given(PARTS)
@settings(deadline=None)
def test_seeds_fit_into_63_bits(parts: list[int | str]) -> None:
    assert 0 <= seed_for(*parts) < 2**63


def test_a_number_and_its_digits_are_different_parts() -> None:
    assert seed_for(1) != seed_for("1")
    assert seed_for("a", "b") != seed_for("ab")
    assert seed_for("a", "b") != seed_for("b", "a")


def test_a_generator_depends_on_its_name_alone() -> None:
    before = torch.get_rng_state()
    first, again = (torch.rand(9, generator=generator_for(3, "dropout")) for _ in range(2))
    other = torch.rand(9, generator=generator_for(3, "sampling"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert generator_for(3, "dropout").initial_seed() == seed_for(3, "dropout")
