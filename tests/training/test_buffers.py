import math

import pytest

from megachat.model.config import OPT_MODELS, Head
from megachat.model.specs import parameter_specs, stage_of, stage_specs
from megachat.parallel.layout import ParallelLayout
from megachat.training.buffers import BUFFER_ELEMENTS, plan_buffers

OPT_13B = OPT_MODELS["facebook/opt-13b"]
CUT = ParallelLayout(tensor=2, pipeline=4, data=2)


@pytest.mark.parametrize("head", Head)
@pytest.mark.parametrize(
    "layout", [CUT, ParallelLayout(data=8), ParallelLayout(tensor=2, pipeline=4)]
)
def test_every_parameter_is_in_one_buffer_of_its_kind(head: Head, layout: ParallelLayout) -> None:
    specs = {spec.name: spec for spec in parameter_specs(OPT_13B, tensor=layout.tensor, head=head)}
    for stage in range(layout.pipeline):
        buffers = plan_buffers(OPT_13B, head=head, layout=layout, stage=stage)
        held = {
            name
            for name, spec in specs.items()
            if stage_of(spec, OPT_13B, pipeline=layout.pipeline) == stage
            or (spec.tied and stage == layout.pipeline - 1)
        }
        names = [name for buffer in buffers for name in buffer]
        assert len(names) == len(set(names)) and set(names) == held
        assert all(len({specs[name].decays for name in buffer}) <= 1 for buffer in buffers)


def test_buffers_end_with_the_parameter_that_fills_them() -> None:
    specs = stage_specs(OPT_13B, tensor=2, pipeline=4, stage=1, head=Head.LANGUAGE_MODEL)
    sizes = {spec.name: math.prod(spec.local_shape(2)) for spec in specs}
    buffers = plan_buffers(OPT_13B, head=Head.LANGUAGE_MODEL, layout=CUT, stage=1)
    full = [buffer for buffer in buffers if sum(sizes[name] for name in buffer) >= BUFFER_ELEMENTS]
    assert len(full) > 10
    for buffer in buffers:
        assert sum(sizes[name] for name in buffer[:-1]) < BUFFER_ELEMENTS


def test_stages_have_equally_many_buffers_with_the_same_decay_in_each_place() -> None:
    """They sum the norms of their buffers one by one."""
    decays = {
        spec.name: spec.decays for spec in parameter_specs(OPT_13B, tensor=2, head=Head.SCALAR)
    }
    kinds = []
    for stage in range(4):
        buffers = plan_buffers(OPT_13B, head=Head.SCALAR, layout=CUT, stage=stage)
        kinds.append([{decays[name] for name in buffer} for buffer in buffers])
    assert len({len(each) for each in kinds}) == 1
    assert any(not place for each in kinds for place in each), "some stage has fewer to fill"
    for places in zip(*kinds, strict=True):
        assert len(set().union(*places)) <= 1


def test_one_data_rank_takes_one_buffer_of_each_kind() -> None:
    layout = ParallelLayout(tensor=8, pipeline=8)
    model = OPT_MODELS["facebook/opt-175b"]
    for stage in (0, 3, 7):
        buffers = plan_buffers(model, head=Head.LANGUAGE_MODEL, layout=layout, stage=stage)
        assert len(buffers) == 2 and all(buffers)
