"""Checks number options against their ranges, in one line that names the option."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from megachat.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """What a number option may be; stands beside its `typer.Option` in the annotation."""

    least: float
    most: float
    """Both are allowed."""

    def __str__(self) -> str:
        """As messages say it."""
        return f"{self.least:,} to {self.most:,}"


NODES = Range(least=1, most=1000)
GPUS_PER_NODE = Range(least=1, most=1024)
GIGABYTES = Range(least=0.001, most=10_000)
"""Of what `megachat plan` and `megachat train` say of a cluster."""


def range_of(hint: Any) -> Range | None:
    """The range in an annotation; None where there is none."""
    return next((item for item in getattr(hint, "__metadata__", ()) if _is_range(item)), None)


def check_ranges(options: "DataclassInstance") -> None:
    """Refuses a number option that is out of its range; one that is not given may be anything.

    Raises:
        ConfigError: Names the option, its value and its range.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        allowed, value = range_of(hints[field.name]), getattr(options, field.name)
        if allowed is None or value is None:
            continue
        if not allowed.least <= value <= allowed.most:
            option = field.name.replace("_", "-")
            raise ConfigError(f"--{option} {value}: expected a number from {allowed}")


def _is_range(item: object) -> bool:
    return isinstance(item, Range)
