"""The `megachat` command: parses options, loads the configuration, starts the ranks.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megachat.cli.build_kernels import build_kernels
from megachat.cli.fetch import fetch
from megachat.cli.plan import plan
from megachat.cli.presets import DeploymentType
from megachat.errors import MegachatError

if TYPE_CHECKING:
    from megachat.data.config import Stage
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


@app.command()
def train(
    config: ConfigOption = None,
    actor_model: Annotated[
        str | None, typer.Option(help="OPT to start from: hub name or HuggingFace folder.")
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="OPT for reward model and critic, likewise.")
    ] = None,
    deployment_type: Annotated[
        DeploymentType | None, typer.Option(help="Where to run, with --actor-model.")
    ] = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Run all three stages; completed ones are skipped.

    Without options it trains the tiny CPU example. With --actor-model it runs the DeepSpeed-Chat
    recipe for that model.
    """
    with _errors_in_one_line():
        from megachat.cli.presets import paper_tree, tiny_example
        from megachat.config import apply_override, build_config, read_toml
        from megachat.data.config import Stage
        from megachat.stages.config import RunConfig

        if config is not None and actor_model is not None:
            raise typer.BadParameter("give either --config or --actor-model")
        if actor_model is not None:
            source = "--actor-model"
            tree = paper_tree(
                actor_model,
                reward_model=reward_model or "facebook/opt-350m",
                deployment=deployment_type or DeploymentType.CPU,
            )
        else:
            if reward_model is not None or deployment_type is not None:
                raise typer.BadParameter("--reward-model, --deployment-type need --actor-model")
            path = config if config is not None else tiny_example()
            source, tree = str(path), read_toml(path)
        for override in overrides or ():
            apply_override(tree, override)
        _run(build_config(RunConfig, tree, source=source), list(Stage), dry_run=dry_run)


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
    """Entry point of the `megachat` script."""
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
    """Checks the configuration, then shows it or starts the ranks."""
    config.check()
    if not dry_run:
        from megachat.parallel.launch import prepare_ranks

        prepare_ranks(config.launch, "megachat.stages.run")
    from megachat.cli.preflight import check_memory
    from megachat.parallel.launch import launch
    from megachat.stages.context import prepare_output
    from megachat.stages.inputs import fetch_missing, inputs_of
    from megachat.stages.run import completed_stages, describe_run, run_stages
    from megachat.telemetry.log import set_up_logging

    if dry_run:
        typer.echo(describe_run(config))
        return
    done = completed_stages(config)
    inputs = inputs_of(config, [stage for stage in stages if stage not in done])
    warning = check_memory(config, stages)
    set_up_logging()
    if fetch_missing(inputs):  # before the ranks join: nobody waits for a download in a collective
        warning = check_memory(config, stages)
    if warning is not None:
        typer.echo(warning, err=True)
    prepare_output(config)
    command = shlex.join(["megachat", *sys.argv[1:]])
    rules = config.ranks_on_one_host()
    launch(config.launch, run_stages, config, stages, command, same_host=rules)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Turns errors that the user can mend into one line and exit status 2."""
    try:
        yield
    except MegachatError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(EXIT_CODE) from None


app.command()(_errors_in_one_line()(plan))
app.command()(_errors_in_one_line()(build_kernels))
app.command()(_errors_in_one_line()(fetch))

if __name__ == "__main__":
    main()
