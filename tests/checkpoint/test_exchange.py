import pytest
import torch
from torch import Tensor

from megachat.checkpoint.exchange import collect, deliver, share_tied
from megachat.model.opt import OptModel
from megachat.model.specs import TensorSpec, stage_of
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks
from tests.model import reference as ref

DEGREES: tuple[dict[str, int], ...] = (
    {"tensor": 2},
    {"tensor": 2, "pipeline": 2},
    {},
    {"tensor": 4},
)


def _whole(spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """Values of the parameter's own that the dtypes here hold exactly."""
    values = torch.arange(spec.num_elements) % 251 + len(spec.name) % 5
    return values.view(spec.unpadded_shape).to(dtype)


def _there_and_back(stored: torch.dtype, held: torch.dtype) -> list[str]:
    """What is wrong after each parameter came from the last copy of the model and went back."""
    wrong = []
    for degrees in DEGREES:
        layout = ParallelLayout.for_world(4, **degrees)
        model = ref.build_model(ref.POST_LN, layout, dtype=held)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        wrong += _deliver_all(model, stored)
        for spec in model.global_specs():
            for stage in range(layout.pipeline):
                wrong += _collect_one(model, spec, stage)
    return wrong


def _deliver_all(model: OptModel, dtype: torch.dtype) -> list[str]:
    here, layout = model.groups.coordinate, model.groups.layout
    source = layout.data - 1
    for spec in model.global_specs():
        if stage_of(spec, model.config, pipeline=layout.pipeline) == here.pipeline:
            is_source = here.tensor == 0 and here.data == source
            deliver(model, spec, _whole(spec, dtype) if is_source else None, source=source)
    share_tied(model)
    specs = model.local_specs()
    return [
        f"delivered {layout} {name}"
        for name, value in model.named_parameters()
        if not torch.equal(value, ref.own_part(model, name, _whole(specs[name], value.dtype)))
    ]


def _collect_one(model: OptModel, spec: TensorSpec, stage: int) -> list[str]:
    """Of the ranks that the docstring of `collect` names, one gets the whole, padding and all."""
    here, layout = model.groups.coordinate, model.groups.layout
    owner = stage_of(spec, model.config, pipeline=layout.pipeline)
    if owner == stage != here.pipeline:
        return []
    found = collect(model, spec, stage=stage, dtype=torch.float32)
    if here.tensor or here.pipeline != stage:
        return [] if found is None else [f"{layout} {spec.name} reached {here}"]
    assert found is not None
    expected = torch.zeros(spec.shape)
    expected[: spec.unpadded_shape[0]] = _whole(spec, torch.float32)
    return [] if torch.equal(found, expected) else [f"collected {layout} {spec.name}"]


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_wholes_are_cut_sent_and_put_together_in_every_layout(
    stored: torch.dtype, held: torch.dtype
) -> None:
    assert run_ranks(4, _there_and_back, stored, held) == [[]] * 4
