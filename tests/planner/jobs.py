"""Jobs to plan, and a strategy that draws legal ones."""

from typing import Any

from hypothesis import strategies as st

from megachat.errors import LayoutError
from megachat.model.config import OPT_MODELS, Head, Recompute, vocab_multiple_for
from megachat.parallel.layout import GenerationPlacement, ParallelLayout
from megachat.planner.job import Job, RoleSetup, Workload

SIZES = tuple(name.removeprefix("facebook/opt-") for name in OPT_MODELS)


def role(
    size: str,
    tensor: int,
    pipeline: int,
    data: int,
    *,
    head: Head = Head.LANGUAGE_MODEL,
    **how: Any,
) -> RoleSetup:
    """An OPT of a size such as `175b` in a layout."""
    return RoleSetup(
        config=OPT_MODELS[f"facebook/opt-{size}"],
        head=head,
        layout=ParallelLayout(tensor=tensor, pipeline=pipeline, data=data),
        **how,
    )


def job(
    size: str,
    tensor: int,
    pipeline: int,
    data: int,
    *,
    generate: int,
    critic: str = "350m",
    workload: Workload | None = None,
    **how: Any,
) -> Job:
    """A job whose critic is cut over data ranks only."""
    world = tensor * pipeline * data
    multiple = vocab_multiple_for(tensor, generate)
    return Job(
        actor=role(size, tensor, pipeline, data, vocab_multiple=multiple, **how),
        critic=role(critic, 1, 1, world, head=Head.SCALAR),
        generation_tensor=generate,
        workload=workload or Workload(),
    )


@st.composite
def layouts(draw: st.DrawFn, size: str) -> ParallelLayout:
    """A layout that cuts an OPT evenly, of at most 64 ranks."""
    degrees = st.sampled_from([1, 2, 4, 8])
    layout = ParallelLayout(tensor=draw(degrees), pipeline=draw(degrees), data=draw(degrees))
    try:
        OPT_MODELS[f"facebook/opt-{size}"].validate_layout(layout)
    except LayoutError:
        layout = ParallelLayout(data=layout.data)
    return layout


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Any size in any legal pair of layouts."""
    size = draw(st.sampled_from(SIZES))
    layout = draw(layouts(size))
    heads = OPT_MODELS[f"facebook/opt-{size}"].heads
    degrees = [d for d in GenerationPlacement.legal_degrees(layout) if heads % d == 0 and d <= 8]
    return job(
        size,
        layout.tensor,
        layout.pipeline,
        layout.data,
        generate=draw(st.sampled_from(degrees)),
        critic=draw(st.sampled_from(["125m", "350m", "1.3b"])),
        workload=Workload(
            prompts=draw(st.sampled_from([1, 24, 256, 1024])),
            prompt_tokens=draw(st.sampled_from([1, 100, 256])),
            response_tokens=draw(st.sampled_from([1, 64, 256])),
        ),
        sequence_parallel=draw(st.booleans()),
        recompute=draw(st.sampled_from(Recompute)),
        micro_batch_rows=draw(st.sampled_from([1, 2, 8])),
    )
