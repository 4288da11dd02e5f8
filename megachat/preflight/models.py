"""Finds out what the models of a run are: by name, from their folders, or from their shapes.

Nothing is downloaded: what is known neither by name nor on this disk is left to the run.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megachat.checkpoint.reader import CONFIG_FILE
from megachat.data.config import Stage
from megachat.errors import CheckpointError, ConfigError, LayoutError, MegachatError
from megachat.hub import (
    Content,
    can_be_fetched,
    folder_on_disk,
    local_folder,
    why_unpublished,
)
from megachat.model.config import OPT_MODELS, Head, OptConfig
from megachat.parallel.layout import ParallelLayout
from megachat.stages.config import FROM_SFT, RoleSection, RunConfig
from megachat.stages.context import tokenizer_folder
from megachat.stages.inputs import ModelInput, inputs_of
from megachat.stages.starts import source_folder, tokenizer_source
from megachat.stages.status import has_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Architectures:
    """What the roles of a run are."""

    actor: OptConfig
    """Of supervised model, actor and reference."""
    critic: OptConfig
    """Of critic and reward model."""


def known_architectures(config: RunConfig) -> Architectures | str:
    """What the models of a run are, or the name of the one that cannot be known yet.

    Raises:
        CheckpointError: A folder has no readable `config.json`.
        ConfigError: One is no OPT, or a shape describes no transformer.
    """
    models = config.models
    actor = architecture(config, "actor")
    if actor is None:
        return models.actor.model or "models.actor.shape"
    critic = architecture(config, "reward")
    if critic is None:
        return models.reward.model or "models.reward.shape"
    return Architectures(actor=actor, critic=critic)


def role_section(config: RunConfig, name: str) -> RoleSection:
    """The section of `actor` or `reward`."""
    return {"actor": config.models.actor, "reward": config.models.reward}[name]


def architecture(config: RunConfig, name: str) -> OptConfig | None:
    """What a role starts from; None where it cannot be known yet.

    Args:
        config: The run.
        name: `actor` or `reward`.

    Raises:
        CheckpointError: As `known_architectures`.
        ConfigError: As there, with the role's key.
    """
    role = role_section(config, name)
    other = _model_of_other_run(config, name)
    if other is not None:
        return other
    if role.shape is not None:
        vocab_size = _vocab_size(config)
        if vocab_size is None:
            return None
        try:
            return role.shape.opt_config(vocab_size=vocab_size, pad_id=0, bos_id=0, eos_id=0)
        except ConfigError as error:
            raise ConfigError(f"models.{name}.shape: {error}") from error
    assert role.model is not None, "a role has a model or a shape"
    if role.model == FROM_SFT:
        return architecture(config, "actor")
    if role.model in OPT_MODELS:
        return OPT_MODELS[role.model]
    folder = folder_on_disk(role.model)
    if folder is None:
        return None
    from megachat.checkpoint.huggingface import read_config

    return read_config(folder)


def _model_of_other_run(config: RunConfig, name: str) -> OptConfig | None:
    """Of a model that another run has left; None: it is this run's, or not there."""
    stage = {"actor": Stage.SFT, "reward": Stage.REWARD}[name]
    folder = source_folder(config, stage)
    if config.run.source_of(stage) is None or not (folder / CONFIG_FILE).is_file():
        return None
    from megachat.checkpoint.huggingface import read_config

    return read_config(folder)


def _vocab_size(config: RunConfig) -> int | None:
    """Of the run's tokenizer, as its file has it; None where that is not on this disk."""
    section, source = config.tokenizer, tokenizer_source(config)
    if source is None:
        assert section.train is not None, "there is a source or a training"
        return section.train.vocab_size
    folder = folder_on_disk(source, Content.TOKENIZER)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    try:
        values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        ids = [int(entry["id"]) for entry in values.get("added_tokens", ())]
        return max([len(values["model"]["vocab"]), *(number + 1 for number in ids)])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # whoever loads the tokenizer says what is wrong with it


def check_available(config: RunConfig, stages: frozenset[Stage]) -> Iterator[MegachatError]:
    """Refuses models and tokenizers that are not here and that nobody can fetch from here."""
    for each in inputs_of(config, stages):
        if not isinstance(each, ModelInput) or each.find() is not None:
            continue
        reason = why_unpublished(each.name)
        if reason is not None:
            yield CheckpointError(f"{each}: {reason}")
        elif not can_be_fetched(each.name):
            with told() as problems:
                local_folder(each.name, each.content)
            yield from problems


def check_layouts(
    config: RunConfig, stages: frozenset[Stage], models: Architectures
) -> Iterator[MegachatError]:
    """Refuses layouts that do not cut the models that the stages train or generate with."""
    world_size, actor = config.launch.world_size, config.models.actor
    cuts = [
        (f"models.{name}", model, layout)
        for name, model in roles_of(models, stages).items()
        if (layout := _layout(role_section(config, name), world_size)) is not None
    ]
    degree = config.rlhf.generation_degree(actor)
    if Stage.PROMPTS in stages and degree != actor.tensor:
        generation = ParallelLayout(tensor=degree)
        cuts.append((f"rlhf.generation_tensor {degree}", models.actor, generation))
    for what, model, layout in cuts:
        with told() as problems:
            model.validate_layout(layout)
        yield from (LayoutError(f"{what}: {problem}") for problem in problems)


def check_positions(
    config: RunConfig, stages: frozenset[Stage], models: Architectures
) -> Iterator[MegachatError]:
    """Refuses rows that are longer than the position table of a model that is read from a disk.

    Those of shapes are in the configuration, and checked with it.
    """
    data, sampling = config.data, config.rlhf.sampling
    answered = data.max_prompt_tokens + sampling.max_new_tokens
    for name, model in roles_of(models, stages).items():
        source = role_section(config, name).model
        if source is None or source == FROM_SFT:
            continue
        if stages != {Stage.PROMPTS} and data.max_tokens > model.max_positions:
            yield ConfigError(
                f"data.max_tokens is {data.max_tokens}, but models.{name}.model {source} has "
                f"{model.max_positions} positions: lower it, or choose another model"
            )
        if Stage.PROMPTS in stages and answered > model.max_positions:
            yield ConfigError(
                f"data.max_prompt_tokens {data.max_prompt_tokens} + rlhf.sampling.max_new_tokens "
                f"{sampling.max_new_tokens} = {answered}, but models.{name}.model {source} has "
                f"{model.max_positions} positions: lower them, or choose another model"
            )


def check_vocabulary(
    config: RunConfig, stages: frozenset[Stage], models: Architectures | None
) -> Iterator[MegachatError]:
    """Refuses a tokenizer that breaks a rule, or has more ids than a model has embeddings.

    A tokenizer on this disk is loaded as the run loads it; one that is yet to be trained has as
    many ids as it is to have.
    """
    size, problems = _tokenizer_size(config)
    yield from problems
    if models is None:
        return
    if Stage.PROMPTS in stages and models.actor.vocab_size != models.critic.vocab_size:
        yield ConfigError(
            f"models.reward has {models.critic.vocab_size} vocabulary rows, models.actor has "
            f"{models.actor.vocab_size}: all roles of rlhf need one vocabulary: choose models with "
            "the same"
        )
    for name, model in roles_of(models, stages).items():
        source = role_section(config, name).model
        if source is None or source == FROM_SFT or size is None or size <= model.vocab_size:
            continue
        yield ConfigError(
            f"models.{name}.model {source}: vocab_size is {model.vocab_size}, but the run's "
            f"tokenizer has {size} ids: use the tokenizer that the model was trained with"
        )


def check_weights(config: RunConfig, stages: frozenset[Stage]) -> Iterator[MegachatError]:
    """Refuses model folders on this disk that lack a tensor or hold another one, by their headers.

    A reward model that does not fit would be found after the supervised stage otherwise.
    """
    from megachat.checkpoint.huggingface import MissingHead, check_folder

    for stage, name, head in (
        (Stage.SFT, "actor", Head.LANGUAGE_MODEL),
        (Stage.REWARD, "reward", Head.SCALAR),
    ):
        source = role_section(config, name).model
        if stage not in stages or source is None or source == FROM_SFT:
            continue
        folder = folder_on_disk(source)
        if folder is None:
            continue
        with told() as problems:
            check_folder(folder, head=head, missing_head=MissingHead.INITIALISE)
        yield from problems


def roles_of(models: Architectures, stages: frozenset[Stage]) -> dict[str, OptConfig]:
    """The roles that stages train, by the name of their section."""
    used = {}
    if not {Stage.SFT, Stage.PROMPTS}.isdisjoint(stages):
        used["actor"] = models.actor
    if not {Stage.REWARD, Stage.PROMPTS}.isdisjoint(stages):
        used["reward"] = models.critic
    return used


@contextmanager
def told() -> Iterator[list[MegachatError]]:
    """Collects what the body raises on purpose."""
    problems: list[MegachatError] = []
    try:
        yield problems
    except MegachatError as error:
        problems.append(error)


def _layout(role: RoleSection, world_size: int) -> ParallelLayout | None:
    """The layout of a role; None where the world has no room for it, which is told elsewhere."""
    if world_size % (role.tensor * role.pipeline):
        return None
    return role.layout(world_size)


def _tokenizer_size(config: RunConfig) -> tuple[int | None, Sequence[MegachatError]]:
    """Ids of the run's tokenizer, where it can be known, and what is wrong with it."""
    with told() as problems:
        if has_tokenizer(config):
            folder: Path | None = tokenizer_folder(config)
        elif (source := tokenizer_source(config)) is None:
            assert config.tokenizer.train is not None, "there is a source or a training"
            return config.tokenizer.train.vocab_size, ()
        else:
            folder = folder_on_disk(source, Content.TOKENIZER)
        if folder is not None:
            from megachat.data.tokenizer import Tokenizer  # seconds, where there is one to load

            return Tokenizer.load(folder).vocab_size, ()
    return None, problems
