"""Writes `docs/planning.md`: what the planner finds for OPT-13B, OPT-66B and OPT-175B.

python tools/plan_tables.py            # rewrites the page
python tools/plan_tables.py --check    # exit status 1 where it is out of date
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from megachat.model.config import OPT_MODELS
from megachat.planner.hardware import cluster_config
from megachat.planner.report import markdown_section
from megachat.planner.search import PlanRequest, search

PAGE = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
CRITIC = "facebook/opt-350m"
ROWS = 5
"""Layouts shown of each ranking."""

INTRODUCTION = """\
<!-- Written by `python tools/plan_tables.py`; a test compares. Do not edit by hand. -->

# What large jobs need

**Every number on this page is predicted.** `megachat plan` computes it from the architecture, the
layouts and the batch; none of these jobs has been run, and no GPU has measured any of it. Bytes of
the long-lived pools are those of the classes that run: `python tools/dry_run.py` lets the
production classes live as any rank of such a job on fake tensors, and the test suite holds the two
within 1 % of each other for ranks of all three models. Activations and workspace follow from
formulas, times from data sheets and assumed efficiencies (`megachat/planner/hardware.py`).

A GPU's memory is taken by more than tensors. *Beside tensors* are CUDA's context and modules,
cuBLAS' workspaces and NCCL's buffers, which are counted for each communicator of the job
(`megachat/planner/reserved.py` and `communicators.py` say from which sources), and a margin of 3 %
that no plan fills. *Rounding* is what torch's caching allocator takes beyond the tensors' own
bytes, a bound from its rules (`allocator.py`); *graphs* are recorded decode steps (`graphs.py`).
`--reserved-gb` of `megachat plan` replaces the count of what is beside tensors; the margin stays.

One PPO step is 1024 prompts x (256 prompt + 256 response) tokens. GPUs are A100 of 80 GB (10^9
bytes), eight to a node; critic and reward model are OPT-350M. Layouts, recomputation and what
leaves the GPU during generation are the planner's own choice: of everything that fits, what is
predicted to be fastest. In the tables, *lent* means that the memory serves foreign blocks and cache
meanwhile, *on host* that the pool is in pinned host memory; foreign blocks are the part of the
generation weights that other ranks train. A run takes such measures where `rlhf.memory` says so.

`megachat train` makes the same computation for its own configuration before it starts anything,
and refuses a run that cannot fit (`launch.memory_check`). With `--actor-model` it also takes the
planner's layouts, for the batches of the published recipe (four prompts a GPU, not 1024 in all):
`--dry-run` shows what was chosen and why.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One section."""

    model: str
    nodes: int


CASES = (
    Case(model="facebook/opt-13b", nodes=1),
    Case(model="facebook/opt-66b", nodes=8),
    Case(model="facebook/opt-175b", nodes=8),
)


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(section(case) for case in CASES)])


def section(case: Case) -> str:
    """What the search finds for one model."""
    cluster = cluster_config(nodes=case.nodes)
    result = search(
        PlanRequest(actor=OPT_MODELS[case.model], critic=OPT_MODELS[CRITIC], cluster=cluster)
    )
    title = f"{case.model} on {cluster.world_size} x {cluster.gpu_memory_gb:g} GB"
    command = (
        f"megachat plan --model {case.model} --critic {CRITIC} --nodes {case.nodes} "
        f"--gpus-per-node {cluster.gpus_per_node} --gpu-memory-gb {cluster.gpu_memory_gb:g} "
        "--search"
    )
    text = markdown_section(result.best, result, title=title, limit=ROWS)
    return f"{text}\nThe same on a terminal: `{command}`.\n"


def main(
    check: Annotated[bool, typer.Option("--check", help="Compare, write nothing.")] = False,
) -> None:
    """Write docs/planning.md, or say whether it is up to date."""
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        typer.echo(f"{PAGE} is out of date: run python tools/plan_tables.py", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
