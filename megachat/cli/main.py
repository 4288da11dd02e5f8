"""The `megachat` command: parses options, loads the configuration, starts the ranks.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from megachat.cli.build_kernels import build_kernels
from megachat.cli.data import data
from megachat.cli.fetch import fetch
from megachat.cli.init import init
from megachat.cli.plan import plan, takes_options
from megachat.cli.presets import DeploymentType, Machine
from megachat.cli.ranges import GIGABYTES, GPUS_PER_NODE, NODES, check_ranges
from megachat.errors import MegachatError
from megachat.parallel.signals import Signalled, catch_signals, report

if TYPE_CHECKING:
    from megachat.data.config import Stage
    from megachat.preflight.checks import Report
    from megachat.stages.config import RunConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train ChatGPT-style assistants from OPT models: SFT, reward model, PPO.",
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Run configuration (TOML).")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. --set sft.max_steps=100."),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Show the resolved configuration and layouts; train nothing."),
]

EXIT_CODE = 2
"""Exit status of errors that the user can mend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """The options of `megachat train`; every field is one."""

    config: ConfigOption = None
    actor_model: Annotated[
        str | None, typer.Option(help="OPT to start from: hub name or HuggingFace folder.")
    ] = None
    reward_model: Annotated[
        str | None, typer.Option(help="OPT for reward model and critic, likewise.")
    ] = None
    deployment_type: Annotated[
        DeploymentType | None, typer.Option(help="Where to run, with --actor-model.")
    ] = None
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPUs that the run is planned for: a100-40, a100-80 (default) or h100-80."
        ),
    ] = None
    nodes: Annotated[
        int | None, typer.Option(help="Machines, where not the deployment type's."), NODES
    ] = None
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs in each machine, likewise."), GPUS_PER_NODE
    ] = None
    gpu_memory_gb: Annotated[
        float | None,
        typer.Option(help="Memory of one GPU, 10^9 bytes; default: the preset's."),
        GIGABYTES,
    ] = None
    overrides: SetOption = None
    dry_run: DryRunOption = False

    @property
    def machine(self) -> Machine:
        """What is said of the GPUs."""
        return Machine(
            gpu=self.gpu,
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            gpu_memory_gb=self.gpu_memory_gb,
        )

    def check(self) -> None:
        """Refuses numbers out of range, and options that exclude each other."""
        check_ranges(self)
        if self.config is not None and self.actor_model is not None:
            raise typer.BadParameter("give either --config or --actor-model")
        if self.actor_model is None and (
            self.reward_model is not None
            or self.deployment_type is not None
            or self.machine.is_stated
        ):
            raise typer.BadParameter(
                "--reward-model, --deployment-type, --gpu, --nodes, --gpus-per-node and "
                "--gpu-memory-gb need --actor-model"
            )


@app.command()
@takes_options(TrainOptions)
def train(options: TrainOptions) -> None:
    """Run all three stages; completed ones are skipped.

    Without options it trains the tiny CPU example. With --actor-model it runs the DeepSpeed-Chat
    recipe for that model, cut over the GPUs as the planner finds best.
    """
    with _errors_in_one_line():
        options.check()
        from megachat.cli.presets import DEFAULT_REWARD_MODEL, paper_tree, tiny_example
        from megachat.config import apply_override, build_config, read_toml
        from megachat.data.config import Stage
        from megachat.stages.config import RunConfig

        overrides = options.overrides or ()
        if options.actor_model is None:
            path = options.config if options.config is not None else tiny_example()
            source, tree = str(path), read_toml(path)
        else:
            source = "--actor-model"
            tree = paper_tree(
                options.actor_model,
                reward_model=options.reward_model or DEFAULT_REWARD_MODEL,
                deployment=options.deployment_type or DeploymentType.CPU,
                machine=options.machine,
            )
        for override in overrides:
            apply_override(tree, override)
        config = build_config(RunConfig, tree, source=source)
        if options.dry_run and options.actor_model is not None and not any(config.problems()):
            for line in _recipe_lines(options, config):
                typer.echo(line)
        _run(config, list(Stage), dry_run=options.dry_run)


def _recipe_lines(options: TrainOptions, config: "RunConfig") -> "list[str]":
    """What was chosen for --actor-model and why, and whether it holds after the overrides."""
    from megachat.cli.presets import DEFAULT_REWARD_MODEL, recipe_cluster
    from megachat.cli.recipe import RecipeModels, choose, explanation, verdict

    assert options.actor_model is not None
    models = RecipeModels(
        actor=options.actor_model, reward=options.reward_model or DEFAULT_REWARD_MODEL
    )
    cluster = recipe_cluster(options.deployment_type or DeploymentType.CPU, options.machine)
    if cluster is None:
        return ["Chosen for one process on this machine's processor; memory is checked at start."]
    lines = explanation(choose(models, cluster), models)
    return lines + (verdict(config, cluster) if options.overrides else [])


@app.command()
def sft(
    config: ConfigOption = None, overrides: SetOption = None, dry_run: DryRunOption = False
) -> None:
    """Run stage 1, supervised fine-tuning."""
    from megachat.data.config import Stage

    _run_stage(Stage.SFT, config, overrides, dry_run=dry_run)


@app.command()
def reward(
    config: ConfigOption = None, overrides: SetOption = None, dry_run: DryRunOption = False
) -> None:
    """Run stage 2, the reward model."""
    from megachat.data.config import Stage

    _run_stage(Stage.REWARD, config, overrides, dry_run=dry_run)


@app.command()
def rlhf(
    config: ConfigOption = None, overrides: SetOption = None, dry_run: DryRunOption = False
) -> None:
    """Run stage 3, PPO."""
    from megachat.data.config import Stage

    _run_stage(Stage.PROMPTS, config, overrides, dry_run=dry_run)


def main() -> None:
    """Runs the command; the `megachat` script comes from `megachat.cli.start`."""
    catch_signals()
    app()


def _run_stage(
    stage: "Stage", config: Path | None, overrides: list[str] | None, *, dry_run: bool
) -> None:
    """Loads a configuration file and runs one of its stages."""
    with _errors_in_one_line():
        from megachat.cli.presets import tiny_example
        from megachat.config import load_config
        from megachat.stages.config import RunConfig

        path = config if config is not None else tiny_example()
        resolved = load_config(RunConfig, path=path, overrides=overrides or ())
        _run(resolved, [stage], dry_run=dry_run)


def _run(config: "RunConfig", stages: "list[Stage]", *, dry_run: bool) -> None:
    """Looks whether the run can start; then says so, or starts the ranks."""
    if not dry_run:
        from megachat.parallel.launch import prepare_ranks

        with suppress(MegachatError):  # the preflight says what is wrong, and what else is
            prepare_ranks(config.launch, "megachat.stages.run")
    from megachat.preflight.checks import preflight

    report = preflight(config, stages)
    if dry_run:
        _show(config, report)
        return
    report.refuse()  # before the imports below, which take seconds
    from megachat.parallel.launch import launch
    from megachat.stages.context import prepare_output
    from megachat.stages.inputs import fetch_missing, inputs_of
    from megachat.stages.run import run_stages
    from megachat.telemetry.log import set_up_logging

    stages = config.own_stages(stages)
    set_up_logging()
    # Before the ranks join: nobody waits for a download in a collective.
    if fetch_missing(inputs_of(config, report.to_run)):
        report = preflight(config, stages)
        report.refuse()
    for note in report.notes:
        typer.echo(note, err=True)
    prepare_output(config)
    command = shlex.join(["megachat", *sys.argv[1:]])
    rules = config.ranks_on_one_host()
    launch(config.launch, run_stages, config, stages, command, same_host=rules)


def _show(config: "RunConfig", report: "Report") -> None:
    """What a run would do, and whether it would start."""
    from megachat.stages.status import describe_run

    with suppress(MegachatError) if report.problems else nullcontext():
        typer.echo(describe_run(config))
    report.refuse()
    for note in report.notes:
        typer.echo(note)
    typer.echo("OK: the run would start")


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Turns whatever ends the command into one line and its exit status.

    2 for what the user can mend, 128 + its number for a signal, 1 for a bug, whose stack is in the
    log file that the line names.
    """
    try:
        yield
    except (TyperException, typer.Exit, typer.Abort):
        raise  # typer's own: wrong options, and ends without an error
    except (Exception, Signalled, KeyboardInterrupt) as error:
        raise typer.Exit(report(error)) from None


app.command()(_errors_in_one_line()(plan))
app.command()(_errors_in_one_line()(build_kernels))
app.command()(_errors_in_one_line()(fetch))
app.command()(_errors_in_one_line()(data))
app.command()(_errors_in_one_line()(init))

if __name__ == "__main__":
    main()
