"""The small logic that the records of a plan have."""

import torch

from megachat.reshard.records import Exchange, Piece, View, contiguous_strides


def test_strides_are_those_of_torch() -> None:
    for shape in ((), (3,), (2, 3), (4, 1, 5)):
        assert contiguous_strides(shape) == torch.empty(shape).stride()
        view = View(offset=7, shape=shape, strides=torch.empty(shape).stride())
        assert view.is_contiguous
        assert view.elements == torch.empty(shape).numel()


def test_a_slice_that_goes_to_several_stages_is_packed_once() -> None:
    columns = View(offset=4, shape=(3, 2), strides=(8, 1))
    rows = View(offset=0, shape=(16,), strides=(1,))
    exchange = Exchange(
        sends=(
            Piece(stage=0, view=columns),
            Piece(stage=2, view=columns),
            Piece(stage=2, view=rows),
        ),
        receives=(Piece(stage=0, view=rows),),
    )
    assert not columns.is_contiguous
    assert exchange.packed_views == (columns,)
    assert exchange.staged_elements == 6
