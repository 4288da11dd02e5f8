"""The one place that turns TOML files and `--set a.b=c` overrides into frozen, validated models.

Knows no component: each component keeps its configuration class beside its code, derived from
`ConfigModel`; `stages/config.py` composes them into the run configuration.
"""

import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Le, Lt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megachat.errors import ConfigError

PathField = Annotated[Path, Field(strict=False)]
"""A path given as a string; relative paths are relative to the working folder."""

_INFINITIES = {"inf": math.inf, "-inf": -math.inf}
"""How they are written in JSON; TOML has the same words without quotes."""
LARGEST_COUNT = 2**31 - 1
"""Of a whole number whose field has no upper bound of its own."""

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""The start of a random stream."""

ModelT = TypeVar("ModelT", bound="ConfigModel")


class ConfigModel(BaseModel):
    """Base of every configuration class: frozen, strict types, unknown keys refused.

    Numbers have a range. A whole number without a bound of its own ends at `LARGEST_COUNT`, a float
    is finite unless its field says `allow_inf_nan=True` ("no bound"). JSON has no word for
    infinity, so it is written as the string "inf", and that string is read as a number wherever one
    stands. NaN is none.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Takes the words for infinity where a number is expected; refuses NaN."""
        if isinstance(value, float) and math.isnan(value):
            raise ValueError("not a number")
        name = info.field_name
        if isinstance(value, str) and value in _INFINITIES and name is not None:
            annotation = cls.model_fields[name].annotation
            if annotation is float or float in typing.get_args(annotation):
                return _INFINITIES[value]
        return value

    @field_serializer("*", mode="wrap", when_used="json")
    def _write_number(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        """Puts the word for infinity in its place."""
        if isinstance(value, float) and math.isinf(value):
            return "inf" if value > 0 else "-inf"
        return handler(value)

    @field_validator("*")
    @classmethod
    def _in_reach(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses whole numbers that no counter, index or size of the libraries below holds."""
        if isinstance(value, int) and abs(value) > LARGEST_COUNT:
            assert info.field_name is not None, "of a field"
            if not has_upper_bound(cls.model_fields[info.field_name]):
                raise ValueError(f"input should be at most {LARGEST_COUNT}")
        return value


def has_upper_bound(field: FieldInfo) -> bool:
    """Whether a number has an upper bound of its own, at any depth of its annotation."""
    waiting: list[Any] = [field]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Le | Lt):
            return True
        if isinstance(item, FieldInfo):
            waiting += [*item.metadata, item.annotation]
        waiting += [*typing.get_args(item), *getattr(item, "__metadata__", ())]
    return False


def load_config(
    model: type[ModelT], *, path: Path | None = None, overrides: Sequence[str] = ()
) -> ModelT:
    """Reads a TOML file, applies overrides and validates the result.

    Args:
        model: The configuration class to build.
        path: The TOML file; None starts from the defaults of `model`.
        overrides: Items `table.key=value`; the value is TOML, or a bare string where it is not.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or a key or value is not acceptable.
    """
    tree = read_toml(path) if path is not None else {}
    for override in overrides:
        apply_override(tree, override)
    return build_config(model, tree, source=str(path) if path is not None else "defaults")


def read_toml(path: Path) -> dict[str, Any]:
    """Parses a TOML file into a tree of dictionaries.

    Raises:
        ConfigError: The file is missing, unreadable or not valid TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Writes one `table.key=value` item into `tree`.

    Entries of a list have numbers from 0 on: `data.sources.0.split=[1,0,0]`. The number after the
    last one appends an entry.

    Raises:
        ConfigError: The item has no `=`, its path runs through a plain value, or a list has no
            such entry.
    """
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override}: expected table.key=value")
    node: dict[str, Any] | list[Any] = tree
    for depth, part in enumerate(parts):
        path = ".".join(parts[:depth])
        is_last = depth == len(parts) - 1
        new = _parse_value(text.strip()) if is_last else {}
        if isinstance(node, list):
            index = _entry(node, part, path=path, override=override)
            if index == len(node):
                node.append(new)
            elif is_last:
                node[index] = new
            child = node[index]
        elif isinstance(node, dict):
            if is_last:
                node[part] = new
            child = node.setdefault(part, new)
        else:
            raise ConfigError(f"--set {override}: {path} is not a table")
        node = child


def _entry(entries: list[Any], part: str, *, path: str, override: str) -> int:
    """The number of a list's entry, or of the one to append.

    Raises:
        ConfigError: It is none.
    """
    if part.isascii() and part.isdigit() and int(part) <= len(entries):
        return int(part)
    count = len(entries)
    there = f"0 to {count - 1} are there and " if count else ""
    raise ConfigError(
        f"--set {override}: {path} is a list of {count}: {part!r} is no entry of it ({there}"
        f"{count} appends one)"
    )


def build_config(model: type[ModelT], tree: Mapping[str, Any], *, source: str) -> ModelT:
    """Validates `tree` against `model`.

    Raises:
        ConfigError: Names every offending dotted key, with a suggestion for unknown keys.
    """
    try:
        return model.model_validate(dict(tree))
    except ValidationError as error:
        found = [_describe(model, detail) for detail in _causes(error.errors())]
        count = f"{len(found)} errors: " if len(found) > 1 else ""
        raise ConfigError(f"{source}: {count}{'; '.join(found)}") from error


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is not TOML (`--set run.output=runs/a`)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Errors but for those that follow from one inside: a list lacks the entry that is refused."""

    def follows(own: tuple[int | str, ...]) -> bool:
        inside = (detail["loc"] for detail in details if len(detail["loc"]) > len(own))
        return any(loc[: len(own)] == own for loc in inside)

    return [detail for detail in details if not follows(detail["loc"])]


def _describe(model: type[BaseModel], detail: ErrorDetails) -> str:
    """One validation error as `dotted.key: what is wrong`."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location) or "configuration"
    if detail["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{key}: unknown key ({hint})"
    if detail["type"] == "missing":
        return f"{key}: required, but not given"
    message = detail["msg"].removeprefix("Value error, ")
    shown = detail["input"]
    if isinstance(shown, dict | BaseModel):
        return f"{key}: {message}"
    return f"{key}: {message[:1].lower()}{message[1:]}, got {shown!r}"


def _keys_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Field names of the nested model that `location` leads to."""
    current = model
    for part in location:
        if part not in current.model_fields:
            continue  # a list index or the tag of a union: the model stays the same
        nested = _nested_model(current.model_fields[part].annotation)
        if nested is None:
            return []
        current = nested
    return list(current.model_fields)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """The configuration class inside an annotation such as `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_origin(
        annotation
    ):
        for argument in typing.get_args(annotation):
            nested = _nested_model(argument)
            if nested is not None:
                return nested
    return None
