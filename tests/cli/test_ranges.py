"""Every number option of every command has a range, and says so in one line."""

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from megachat.cli.main import app
from megachat.cli.ranges import Range, range_of

REQUIRED = {
    "data": ["rows.jsonl"],
    "plan": ["--model", "facebook/opt-125m"],
    "train": ["--actor-model", "facebook/opt-125m", "--deployment-type", "multi_node"],
}
"""What else a command needs before it looks at its numbers."""


def _number_options() -> Iterator[tuple[str, str, Any]]:
    """(command, option, annotation)."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        for parameter in inspect.signature(command.callback).parameters.values():
            kinds = set(typing.get_args(parameter.annotation)) | {parameter.annotation}
            inner = {part for kind in kinds for part in (kind, *typing.get_args(kind))}
            if inner & {int, float}:
                yield name, "--" + parameter.name.replace("_", "-"), parameter.annotation


OPTIONS = list(_number_options())


def test_the_commands_with_numbers_are_looked_at() -> None:
    assert {command for command, _, _ in OPTIONS} == set(REQUIRED)


@pytest.mark.parametrize(
    ("command", "option", "annotation"), OPTIONS, ids=[f"{a} {b}" for a, b, _ in OPTIONS]
)
def test_a_number_option_out_of_its_range_is_refused(
    command: str, option: str, annotation: Any
) -> None:
    allowed = range_of(annotation)
    assert isinstance(allowed, Range), f"{command} {option} has no range"
    for value in (int(allowed.least) - 1, int(allowed.most) + 1):
        result = CliRunner().invoke(app, [command, *REQUIRED[command], option, str(value)])
        assert result.exit_code == 2, result.output
        assert (
            f"ConfigError: {option} {value}" in result.stderr
            and "expected a number" in result.stderr
        )
        assert result.stderr.count("\n") == 1
