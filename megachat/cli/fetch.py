"""`megachat fetch`: brings models and data sets onto a machine, for runs without a network."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megachat.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megachat.stages.inputs import Input


def fetch(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL...", help="Hub names of models.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A data set, as data.sources names it; may be repeated."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="All that this run configuration (TOML) needs."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override in it, as for train."),
    ] = None,
) -> None:
    """Download models and data sets into this machine's caches.

    Clusters often have a network on the login node only: run this there, with the same HF_HOME as
    the job. What is here already is left as it is.
    """
    from megachat.hub import lacking
    from megachat.stages.inputs import ModelInput, check_published

    if overrides and config is None:
        raise typer.BadParameter("--set needs --config")
    inputs = _asked_for(models or [], data or [], config, overrides or [])
    if not inputs:
        raise ConfigError("nothing to fetch: name models, --data NAME or --config FILE")
    check_published(inputs)
    total = 0
    for each in inputs:
        found = each.find()
        place = found if found is not None else each.fetch()
        if isinstance(each, ModelInput) and (name := lacking(place.path, each.content)) is not None:
            raise CheckpointError(f"{each}: {place.path} has no {name}: give a whole folder")
        state = "fetched" if found is None else "was there"
        total += place.num_bytes if found is None else 0
        typer.echo(f"{each}: {state}, {place.num_bytes / 1e6:.1f} MB, {place.path}")
    typer.echo(f"{len(inputs)} in all, {total / 1e6:.1f} MB fetched")


def _asked_for(
    models: list[str], data: list[str], config: Path | None, overrides: list[str]
) -> "list[Input]":
    """What the options name, each once."""
    from megachat.config import build_config, load_config
    from megachat.data.config import SourceConfig, Stage
    from megachat.stages.config import RunConfig
    from megachat.stages.inputs import DataInput, Input, ModelInput, inputs_of

    inputs: list[Input] = [ModelInput(name=name) for name in models]
    for name in data:
        source = build_config(SourceConfig, {"name": name}, source="--data")
        inputs.append(DataInput(source=source))
    if config is not None:
        run = load_config(RunConfig, path=config, overrides=overrides)
        inputs += inputs_of(run, list(Stage))
    return list(dict.fromkeys(inputs))
