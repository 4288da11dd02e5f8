import importlib
import json
import math
import pkgutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

import megachat
from megachat.config import (
    ConfigModel,
    PathField,
    apply_override,
    build_config,
    load_config,
    read_toml,
)
from megachat.errors import ConfigError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(ConfigModel):
    rate: float = Field(default=0.5, gt=0)
    bound: float = Field(default=math.inf, allow_inf_nan=True)
    steps: int = 3


class Item(ConfigModel):
    name: str
    weight: float = Field(default=1.0, allow_inf_nan=True)


class Outer(ConfigModel):
    inner: Inner = Inner()
    maybe: Inner | None = None
    items: Annotated[tuple[Item, ...], Field(strict=False)] = ()
    colour: Annotated[Colour, Field(strict=False)] = Colour.RED
    path: PathField = Path("here")
    flag: bool = False
    low: float = 0.0
    high: float = Field(default=1.0, allow_inf_nan=True)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}: lower one of them")
        return self


def read_strictly(text: str) -> Any:
    """Parses what JSON's grammar allows, which Python's parser goes beyond."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_a_file_and_overrides_are_laid_over_the_defaults(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        'colour = "blue"\npath = "there"\n[inner]\nrate = 0.25\n[[items]]\nname = "a"\n',
    )
    overrides = ["inner.steps = 9", "maybe.bound=inf", "path=runs/a b", "low=-1e-3"]
    config = load_config(Outer, path=path, overrides=overrides)
    assert config == Outer(
        inner=Inner(rate=0.25, steps=9),
        maybe=Inner(bound=math.inf),
        items=(Item(name="a"),),
        colour=Colour.BLUE,
        path=Path("runs/a b"),
        low=-1e-3,
    )
    assert load_config(Outer) == Outer()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("iner.rate=1.0", r"defaults: iner: unknown key \(did you mean 'inner'\?\)"),
        ("inner.rat=1.0", r"inner\.rat: unknown key \(did you mean 'rate'\?\)"),
        ("maybe.stepz=1", r"maybe\.stepz: unknown key \(did you mean 'steps'\?\)"),
        ("items=[{name='a', wait=2.0}]", r"items\.0\.wait: unknown key .*'weight'"),
        ("inner.qqq=1", r"inner\.qqq: unknown key \(known keys: bound, rate, steps\)"),
        ("inner.rate=fast", r"inner\.rate: input should be a valid number, got 'fast'"),
        ("inner.rate=-1.0", r"inner\.rate: input should be greater than 0, got -1\.0"),
        ("inner.steps=2.5", r"inner\.steps: input should be a valid integer, got 2\.5"),
        ("inner.steps='3'", r"inner\.steps: input should be a valid integer, got '3'"),
        ("flag=1", r"flag: input should be a valid boolean, got 1"),
        ("inner=3", r"inner: .*Inner, got 3"),
        ("colour=green", r"colour: input should be 'red' or 'blue', got 'green'"),
        ("items=[{}]", r"items\.0\.name: required, but not given"),
        ("low=2.0", r"low 2\.0 is above high 1\.0: lower one of them"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Outer, overrides=[override])
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_listed_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, overrides=["flag=1", "inner.steps=x", "colour=green", "hihg=1"])
    start, *rest = str(caught.value).split("; ")
    assert start.startswith("defaults: 4 errors: inner.steps: ")
    assert [item.split(":")[0] for item in rest] == ["colour", "flag", "hihg"]
    assert "\n" not in str(caught.value)


def test_a_list_is_not_called_short_of_an_entry_that_is_refused() -> None:
    class Filled(ConfigModel):
        items: Annotated[tuple[Item, ...], Field(strict=False, min_length=1)]

    with pytest.raises(ConfigError) as caught:
        build_config(Filled, {"items": [{"name": 3}]}, source="here")
    assert str(caught.value) == "here: items.0.name: input should be a valid string, got 3"


def test_an_override_reaches_the_entries_of_a_list() -> None:
    tree = {"items": [{"name": "a"}, {"name": "b"}], "pair": [1, 2]}
    for override in ("items.1.weight=2.5", "items.2.name=c", "items.0={name='z'}", "pair.0=7"):
        apply_override(tree, override)
    assert tree == {
        "items": [{"name": "z"}, {"name": "b", "weight": 2.5}, {"name": "c"}],
        "pair": [7, 2],
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("items.2.name=c", "items is a list of 1: '2' is no entry of it \\(0 to 0 are there and 1"),
        ("items.-1.name=c", "'-1' is no entry"),
        ("items.name=c", "items is a list of 1: 'name' is no entry"),
        ("items.0.name.x=c", r"items\.0\.name is not a table"),
        ("none.1=c", "none is a list of 0: '1' is no entry of it \\(0 appends one\\)"),
    ],
)
def test_an_entry_that_a_list_does_not_have_is_refused(override: str, message: str) -> None:
    tree: dict[str, Any] = {"items": [{"name": "a"}], "none": []}
    with pytest.raises(ConfigError, match=message):
        apply_override(tree, override)
    assert tree == {"items": [{"name": "a"}], "none": []}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.steps=2147483648", r"inner\.steps: input should be at most 2147483647, got"),
        ("inner.steps=-1000000000000", r"inner\.steps: input should be at most"),
        ("inner.rate=inf", r"inner\.rate: input should be a finite number, got inf"),
        ("low=nan", "low: not a number, got nan"),
    ],
)
def test_a_number_without_a_bound_of_its_own_has_one(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, overrides=[override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.rate", r"--set inner\.rate: expected table\.key=value"),
        ("=3", "expected table.key=value"),
        ("inner..rate=3", "expected table.key=value"),
        ("low.lower=3", r"--set low\.lower=3: low is not a table"),
    ],
)
def test_an_override_that_names_no_place_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_override({"low": 0.5}, override)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-2.5e-3", -2.5e-3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("inf", math.inf),
        ('"a=b"', "a=b"),
        ("a=b", "a=b"),
        ("facebook/opt-13b", "facebook/opt-13b"),
        ("{a = 1}", {"a": 1}),
        ("", ""),
    ],
)
def test_an_override_is_toml_or_else_plain_text(text: str, value: Any) -> None:
    tree: dict[str, Any] = {}
    apply_override(tree, f"table.key={text}")
    assert tree == {"table": {"key": value}}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a = \n", "not valid TOML"), (b"a = '\xff'\n", "not valid TOML"), (None, "cannot read")],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_toml(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_errors_name_the_file_they_are_in(tmp_path: Path) -> None:
    path = _write(tmp_path, "flag = 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, path=path)
    assert str(caught.value).startswith(f"{path}: flag:")


def test_models_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Inner().rate = 1.0  # type: ignore[misc]


FLOATS = st.floats(allow_nan=False)


@given(
    bounds=st.lists(FLOATS, min_size=2, max_size=2),
    names=st.lists(st.text(), max_size=3),
    colour=st.sampled_from(Colour),
)
@settings(deadline=None, max_examples=40)
def test_a_dumped_configuration_loads_again(
    bounds: list[float], names: list[str], colour: Colour
) -> None:
    """Also where a bound is infinite, for which JSON has no word."""
    config = Outer(
        inner=Inner(bound=bounds[0]),
        maybe=Inner(bound=-math.inf),
        items=tuple(Item(name=name, weight=bounds[1]) for name in names),
        colour=colour,
        high=math.inf,
    )
    for text in (config.model_dump_json(), json.dumps(config.model_dump(mode="json"))):
        assert build_config(Outer, read_strictly(text), source="dump") == config
    assert json.loads(text)["high"] == "inf" and json.loads(text)["maybe"]["bound"] == "-inf"


@pytest.mark.parametrize("word", ["infinity", "Infinity", "nan", "1.0", ""])
def test_other_words_are_no_numbers(word: str) -> None:
    with pytest.raises(ConfigError, match="high: .*number"):
        build_config(Outer, {"high": word}, source="dump")


def test_nan_is_no_number() -> None:
    for key in ("high", "inner.bound", "inner.rate"):
        with pytest.raises(ConfigError, match=f"{key}: not a number, got nan"):
            load_config(Outer, overrides=[f"{key}=nan"])
    assert load_config(Outer, overrides=["high=inf"]).high == math.inf
    assert build_config(Item, {"name": "inf"}, source="dump").name == "inf"


def _configurations() -> list[type[ConfigModel]]:
    """Every configuration class of the library, found by importing all of it."""
    for module in pkgutil.walk_packages(megachat.__path__, "megachat."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: list[type[ConfigModel]] = []
    waiting = ConfigModel.__subclasses__()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("megachat."):
            found.append(kind)
    return found


def _is_complete(kind: type[ConfigModel]) -> bool:
    """Whether it can be built without giving anything."""
    try:
        kind()
    except ValidationError:
        return False
    return True


def test_the_defaults_of_every_configuration_can_be_written_and_read() -> None:
    """What fails is most likely an enum that lacks `strict=False`: TOML has no enums."""
    complete = [kind for kind in _configurations() if _is_complete(kind)]
    assert len(complete) >= 10
    for kind in complete:
        tree = read_strictly(kind().model_dump_json())
        assert build_config(kind, tree, source=kind.__name__) == kind()
