"""`megachat plan`: what a job of any size would need, computed on this machine without any GPU."""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from megachat.cli.ranges import GIGABYTES, GPUS_PER_NODE, NODES, Range, check_ranges
from megachat.errors import ConfigError

if TYPE_CHECKING:
    from megachat.model.config import OptConfig
    from megachat.parallel.layout import ParallelLayout
    from megachat.planner.search import PlanRequest

OptionsT = TypeVar("OptionsT")

_WIDTH = 150
"""Columns of the tables where no terminal says otherwise."""


_GIGABYTES_OR_NONE = Range(least=0, most=10_000)
_HOST_GIGABYTES = Range(least=0, most=1_000_000)
_DEGREES = Range(least=1, most=1024)
_ROWS = Range(least=1, most=2**20)
_TOKENS = Range(least=1, most=2**20)
_PASSES = Range(least=1, most=1000)
_RANKS = Range(least=0, most=2**20)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """The options of `megachat plan`; every field is one."""

    model: Annotated[
        str, typer.Option(help="Actor: OPT by hub name (facebook/opt-175b) or HuggingFace folder.")
    ]
    critic: Annotated[str, typer.Option(help="Critic and reward model, likewise.")] = (
        "facebook/opt-350m"
    )
    gpu: Annotated[
        str, typer.Option(help="Preset of memory and speeds: a100-40, a100-80 or h100-80.")
    ] = "a100-80"
    nodes: Annotated[int, typer.Option(help="Machines."), NODES] = 1
    gpus_per_node: Annotated[int, typer.Option(help="GPUs in each machine."), GPUS_PER_NODE] = 8
    gpu_memory_gb: Annotated[
        float | None,
        typer.Option(help="Memory of one GPU, 10^9 bytes; default: the preset's."),
        GIGABYTES,
    ] = None
    reserved_gb: Annotated[
        float | None,
        typer.Option(
            help="Part of it that is taken beside tensors (CUDA context, NCCL's buffers, "
            "workspaces), in place of the planner's own count."
        ),
        _GIGABYTES_OR_NONE,
    ] = None
    host_memory_gb: Annotated[
        float | None,
        typer.Option(help="Pinned host memory of a node, 10^9 bytes."),
        _HOST_GIGABYTES,
    ] = None
    train: Annotated[
        str | None,
        typer.Option(
            metavar="TENSOR,PIPELINE,DATA",
            help="Fixes the actor's training layout; default: searched.",
        ),
    ] = None
    generate: Annotated[
        int | None,
        typer.Option(help="Fixes the tensor degree of generation; default: searched."),
        _DEGREES,
    ] = None
    critic_train: Annotated[
        str | None,
        typer.Option(metavar="TENSOR,PIPELINE,DATA", help="Fixes the critic's layout."),
    ] = None
    prompts: Annotated[
        int, typer.Option(help="Prompts of a PPO step, over the whole job."), _ROWS
    ] = 1024
    prompt_tokens: Annotated[int, typer.Option(help="Longest prompt."), _TOKENS] = 256
    response_tokens: Annotated[int, typer.Option(help="Longest response."), _TOKENS] = 256
    ppo_epochs: Annotated[int, typer.Option(help="Passes over each experience."), _PASSES] = 1
    minibatches: Annotated[int, typer.Option(help="Optimizer steps of a pass."), _ROWS] = 1
    sft_rows: Annotated[int, typer.Option(help="Rows of a batch of fine-tuning."), _ROWS] = 512
    reward_pairs: Annotated[
        int, typer.Option(help="Pairs of a batch of reward training."), _ROWS
    ] = 256
    micro_batch_rows: Annotated[int, typer.Option(help="Rows that go through at once."), _ROWS] = 2
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block of the cache."), _TOKENS] = 32
    max_sequences: Annotated[
        int | None,
        typer.Option(help="Sequences in work at once per replica; default: what fits."),
        _ROWS,
    ] = None
    rank: Annotated[
        int | None, typer.Option(help="Whose memory to show; default: the fullest rank's."), _RANKS
    ] = None
    search: Annotated[bool, typer.Option("--search", help="Show the ranking of all layouts.")] = (
        False
    )
    limit: Annotated[int, typer.Option(help="Rows of the ranking."), _ROWS] = 10
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False


def takes_options(
    record: type[OptionsT],
) -> Callable[[Callable[[OptionsT], None]], Callable[..., None]]:
    """Makes a function of a dataclass a command whose options are the fields."""
    hints = get_type_hints(record, include_extras=True)

    def decorate(function: Callable[[OptionsT], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function(record(**values))

        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(record)  # type: ignore[arg-type]
        ]
        vars(command)["__signature__"] = inspect.Signature(parameters)
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


@takes_options(PlanOptions)
def plan(options: PlanOptions) -> None:
    """Plan a job: memory of every pool in every phase, layouts, bytes moved, predicted times.

    Nothing is run and no GPU is needed. Without --train and --generate the layouts are searched;
    what does not fit is refused with the numbers of both sides.
    """
    from rich.console import Console

    from megachat.planner import report
    from megachat.planner.search import search

    check_ranges(options)
    request = _request(options)
    result = search(request)
    best = result.best
    title = (
        f"{options.model} with {options.critic} on {request.cluster.nodes} x "
        f"{request.cluster.gpus_per_node} GPUs of {request.cluster.gpu_memory_gb:g} GB, "
        f"{options.prompts} x ({options.prompt_tokens} + {options.response_tokens}) tokens a step"
    )
    if options.as_json:
        content: dict[str, Any] = {"model": options.model, "critic_model": options.critic}
        content |= report.plan_json(best)
        if options.search:
            content["search"] = report.search_json(result, limit=options.limit)
        typer.echo(json.dumps(content, indent=2, allow_nan=False))
    elif options.as_markdown:
        typer.echo(report.markdown_section(best, result, title=title, limit=options.limit))
    else:
        console = Console(width=None if sys.stdout.isatty() else _WIDTH)
        console.print(report.plan_view(best, title=title, rank=options.rank))
        if options.search:
            console.print(report.search_view(result, limit=options.limit))


def _request(options: PlanOptions) -> "PlanRequest":
    """The options as the planner takes them."""
    from megachat.planner.hardware import Gpu, cluster_config
    from megachat.planner.job import Workload
    from megachat.planner.search import PlanRequest, RoleOptions

    if options.gpu not in list(Gpu):
        raise ConfigError(f"--gpu {options.gpu}: expected one of {', '.join(Gpu)}")
    cluster = cluster_config(
        Gpu(options.gpu),
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu_memory_gb=options.gpu_memory_gb,
        reserved_gb=options.reserved_gb,
        host_memory_gb=options.host_memory_gb,
    )
    if options.rank is not None and not 0 <= options.rank < cluster.world_size:
        raise ConfigError(f"--rank {options.rank}: the job has ranks 0 to {cluster.world_size - 1}")
    rows = options.micro_batch_rows
    layouts = [
        None if text is None else parse_layout(text)
        for text in (options.train, options.critic_train)
    ]
    return PlanRequest(
        actor=architecture(options.model),
        critic=architecture(options.critic),
        cluster=cluster,
        workload=Workload(
            prompts=options.prompts,
            prompt_tokens=options.prompt_tokens,
            response_tokens=options.response_tokens,
            ppo_epochs=options.ppo_epochs,
            minibatches=options.minibatches,
            sft_rows=options.sft_rows,
            sft_tokens=options.prompt_tokens + options.response_tokens,
            reward_pairs=options.reward_pairs,
        ),
        actor_options=RoleOptions(layout=layouts[0], micro_batch_rows=rows),
        critic_options=RoleOptions(layout=layouts[1], micro_batch_rows=rows),
        generation_tensor=options.generate,
        block_tokens=options.block_tokens,
        max_sequences=options.max_sequences,
    )


def find_architecture(model: str) -> "OptConfig | None":
    """An OPT by its hub name, from a folder or from the hub's cache; None: it is not here.

    Asks no network.

    Raises:
        ConfigError: A folder without a `config.json` of an OPT.
    """
    from megachat.model.config import OPT_MODELS

    if model in OPT_MODELS:
        return OPT_MODELS[model]
    from megachat.hub import folder_on_disk  # the hub's client, for names that are looked up only

    folder = folder_on_disk(model)
    return None if folder is None else architecture(str(folder))


def architecture(model: str) -> "OptConfig":
    """An OPT by its hub name or from the folder of a HuggingFace model."""
    from megachat.model.config import OPT_MODELS, OptConfig

    if model in OPT_MODELS:
        return OPT_MODELS[model]
    path = Path(model, "config.json")
    if not path.is_file():
        raise ConfigError(
            f"{model}: neither a folder with a config.json nor one of {', '.join(OPT_MODELS)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    try:
        return OptConfig.from_huggingface(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_layout(text: str) -> "ParallelLayout":
    """`8,8,1` as tensor, pipeline and data degree.

    Raises:
        ConfigError: The text is of another form.
        LayoutError: A degree is below 1.
    """
    from megachat.parallel.layout import ParallelLayout

    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"layout {text!r}: expected TENSOR,PIPELINE,DATA such as 8,8,1")
    tensor, pipeline, data = (int(part) for part in parts)
    return ParallelLayout(tensor=tensor, pipeline=pipeline, data=data)
