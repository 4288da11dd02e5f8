"""Every number of a run's configuration has a range."""

import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from annotated_types import Ge, Gt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megachat.planner.hardware import ClusterConfig
from megachat.stages.config import RunConfig

UNBOUNDED_BELOW = {"rlhf.ppo.reward.missing_eos_value"}
"""A reward, which may be anything finite."""


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in (*typing.get_args(annotation), *getattr(annotation, "__metadata__", ())):
        yield from _parts(part)
    for part in annotation.metadata if isinstance(annotation, FieldInfo) else ():
        yield from _parts(part)


def _numbers(
    model: type[BaseModel], prefix: str = ""
) -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    """(dotted key, the class that it is a field of, the field) of all numbers."""
    for name, field in model.model_fields.items():
        parts = list(_parts(field.annotation))
        if int in parts or float in parts:
            yield prefix + name, model, field
        for inner in parts:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _numbers(inner, f"{prefix}{name}.")


NUMBERS = [*_numbers(RunConfig), *_numbers(ClusterConfig, "cluster.")]


def test_there_are_numbers_of_every_section() -> None:
    sections = {key.split(".")[0] for key, _, _ in NUMBERS}
    assert sections == {*RunConfig.model_fields, "cluster"}


@pytest.mark.parametrize(("key", "model", "field"), NUMBERS, ids=[key for key, _, _ in NUMBERS])
def test_a_number_has_a_range(key: str, model: type[BaseModel], field: FieldInfo) -> None:
    parts = [*_parts(field.annotation), *field.metadata]
    has_least = any(isinstance(part, Ge | Gt) for part in parts)
    assert has_least or key in UNBOUNDED_BELOW
    name = key.rsplit(".", 1)[-1]
    says_infinite = any(getattr(part, "allow_inf_nan", None) is True for part in parts)
    huge: list[Any] = [10**30] if int in parts else [math.nan] + [math.inf] * (not says_infinite)
    for value in huge:
        shape = (value,) * 3 if "split" in name else value
        with pytest.raises(ValidationError) as caught:
            model.model_validate({name: shape})
        assert any(detail["loc"][0] == name for detail in caught.value.errors())
