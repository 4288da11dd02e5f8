"""`megachat init`: writes a configuration for one's own data that trains at once."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to write.")] = Path("."),
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A file or folder of rows; may be repeated."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="KNOWN=YOURS", help="E.g. --column prompt=question."),
    ] = None,
) -> None:
    """Write a commented run.toml for your own data; nothing is asked and nothing overwritten.

    It trains a small vocabulary and a tiny model on this machine's processor. With --data, the
    files are looked at: limits and batches are chosen so that they fit.
    """
    from megachat.cli.data import chosen_sources, read_columns
    from megachat.data.config import Stage
    from megachat.stages.starter import refuse_existing, starter, write_starter

    refuse_existing(folder)
    sources = chosen_sources(data, read_columns(columns or [])) if data else []
    with tempfile.TemporaryDirectory(prefix="megachat-init-") as name:
        content = starter(folder, sources, scratch=Path(name))
    path = write_starter(folder, content)
    typer.echo(f"wrote {path}")
    if not sources:
        typer.echo(
            f"name your file under [[data.sources]] in it, then: megachat data --config {path}"
        )
    elif len(content.stages) < len(Stage):
        served = ", ".join(content.stages)
        typer.echo(f"these rows can serve {served} only; next: megachat sft --config {path}")
    else:
        typer.echo(f"next: megachat train --config {path}")
