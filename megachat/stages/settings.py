"""Lists the settings that a stage's output depends on, by their dotted keys (pure).

How the work is cut over processes and micro-batches, and who computes generation and
log-probabilities, do not count: they change rounding only. Where files lie does not count either;
what they hold does, and `megachat.stages.origin` looks at that.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from megachat.data.config import Stage
from megachat.stages.config import FROM_SFT, RunConfig
from megachat.stages.starts import tokenizer_source

Tree = dict[str, Any]

_CUT = ("tensor", "pipeline", "sequence_parallel", "recompute", "micro_batch_rows")
_BACKENDS = ("logprob_backend",)
_STARTS = ("model", "shape")
"""What a role starts from; the models of earlier stages, in the last one."""
_RLHF_MEANS = ("generation", "generation_tensor", "memory", "logprob_tolerance")
_SOURCE_PLACES = ("path", "subset", "revision")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Values by key, and which of them are not the defaults of this version."""

    values: Mapping[str, Any]
    chosen: frozenset[str]

    def changes_since(self, recorded: Mapping[str, Any]) -> list[str]:
        """What differs from the values of an earlier time, a text for each key.

        A key that was not there yet has had the effect of its default.
        """
        keys = dict.fromkeys((*recorded, *self.values))
        return [
            f"{key} was {_shown(recorded, key)}, is {_shown(self.values, key)}"
            for key in keys
            if self._is_other(key, recorded)
        ]

    def _is_other(self, key: str, recorded: Mapping[str, Any]) -> bool:
        if key in recorded and key in self.values:
            return bool(recorded[key] != self.values[key])
        return key in recorded or key in self.chosen


def stage_settings(config: RunConfig, stage: Stage) -> Settings:
    """What determines the output of a stage, besides the content of what it reads."""
    return _settings(config, lambda tree: _stage_tree(tree, stage))


def tokenizer_settings(config: RunConfig) -> Settings:
    """What determines the run's tokenizer, likewise; of one from elsewhere its chat template."""
    is_trained = tokenizer_source(config) is None
    return _settings(config, _trained_tokenizer_tree if is_trained else _chat_tree)


def _settings(config: RunConfig, choose: Callable[[Tree], Tree]) -> Settings:
    every = choose(config.model_dump(mode="json"))
    chosen = choose(_not_defaults(config))
    return Settings(values=dict(_flat(every)), chosen=frozenset(key for key, _ in _flat(chosen)))


def _not_defaults(model: BaseModel) -> Tree:
    """The settings that are not at their defaults; a required one never is."""
    tree: Tree = {}
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if not info.is_required() and value == info.get_default(call_default_factory=True):
            continue
        if isinstance(value, BaseModel):
            tree[name] = _not_defaults(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            tree[name] = [_not_defaults(each) for each in value]
        else:
            tree[name] = value
    return tree


def _stage_tree(tree: Tree, stage: Stage) -> Tree:
    models = tree["models"]
    parts = {
        "run": _only(tree.get("run", {}), "seed"),
        "tokenizer": _only(tree.get("tokenizer", {}), "train"),
        "data": _data_tree(tree["data"]),
    }
    if stage is Stage.SFT:
        parts |= {"models": {"actor": _role(models["actor"])}, "sft": tree.get("sft", {})}
    elif stage is Stage.REWARD:
        parts |= {"models": {"reward": _role(models["reward"])}, "reward": tree.get("reward", {})}
    else:
        roles = {name: _without(_role(models[name]), *_STARTS) for name in ("actor", "reward")}
        parts |= {"models": roles, "rlhf": _without(tree.get("rlhf", {}), *_RLHF_MEANS)}
    return parts


def _trained_tokenizer_tree(tree: Tree) -> Tree:
    return {"tokenizer": {"train": tree["tokenizer"]["train"]}, "data": _data_tree(tree["data"])}


def _chat_tree(tree: Tree) -> Tree:
    return {"data": _only(tree["data"], "chat")}


def _data_tree(data: Tree) -> Tree:
    sources = [_without(source, *_SOURCE_PLACES) for source in data["sources"]]
    return {**_without(data, "cache_dir"), "sources": sources}


def _role(role: Tree) -> Tree:
    kept = _without(role, *_CUT, *_BACKENDS)
    return kept if kept.get("model") == FROM_SFT else _without(kept, "model")


def _only(tree: Tree, *keys: str) -> Tree:
    return {key: tree[key] for key in keys if key in tree}


def _without(tree: Tree, *keys: str) -> Tree:
    return {key: value for key, value in tree.items() if key not in keys}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key; items of lists of tables by their numbers."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        yield key, value
        return
    for name, each in items:
        yield from _flat(each, f"{key}.{name}" if key else str(name))


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"
