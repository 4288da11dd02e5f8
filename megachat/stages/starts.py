"""Says where the models lie that a stage starts from: named, this run's or another run's (pure).

The tokenizer that all models of a run share is found likewise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megachat.data.config import Stage
from megachat.stages.config import FROM_SFT, RunConfig
from megachat.stages.results import MODEL_FOLDER

STAGE_FOLDERS: Mapping[Stage, str] = {
    Stage.SFT: "sft",
    Stage.REWARD: "reward",
    Stage.PROMPTS: "rlhf",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StartModel:
    """A model that a stage starts from."""

    role: str
    """`actor` or `reward`, as in `models`."""
    name: str
    """A folder or hub name."""
    stage: Stage | None
    """Whose output it is, of this run or of another one; None: neither's."""


def source_folder(config: RunConfig, stage: Stage) -> Path:
    """Where later stages read the model of a stage: in this run's folder or in another run's."""
    other = config.run.source_of(stage)
    return (other or config.run.output) / STAGE_FOLDERS[stage] / MODEL_FOLDER


def start_models(config: RunConfig, stage: Stage) -> tuple[StartModel, ...]:
    """The models that a stage reads at its start; none where it starts from random weights."""
    models = config.models
    if stage is Stage.PROMPTS:
        return (
            _output_of(config, Stage.SFT, role="actor"),
            _output_of(config, Stage.REWARD, role="reward"),
        )
    if stage is Stage.REWARD and models.reward.model == FROM_SFT:
        return (_output_of(config, Stage.SFT, role="reward"),)
    role = "actor" if stage is Stage.SFT else "reward"
    name = (models.actor if stage is Stage.SFT else models.reward).model
    return () if name is None else (StartModel(role=role, name=name, stage=None),)


def _output_of(config: RunConfig, stage: Stage, *, role: str) -> StartModel:
    return StartModel(role=role, name=str(source_folder(config, stage)), stage=stage)


def tokenizer_source(config: RunConfig) -> str | None:
    """The folder or hub name that the run's tokenizer is copied from; None: it is trained."""
    if config.tokenizer.path is not None:
        return config.tokenizer.path
    if config.run.sft_from is not None:
        return str(source_folder(config, Stage.SFT))
    if config.tokenizer.train is None:
        return config.models.actor.model
    if config.run.reward_from is not None:
        return str(source_folder(config, Stage.REWARD))
    return None
