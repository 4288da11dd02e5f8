"""The one place for what all stages of a run share: worker, folders, tokenizer, process groups."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megachat.data.config import Stage
from megachat.errors import ConfigError
from megachat.parallel.launch import Worker
from megachat.parallel.layout import ParallelLayout
from megachat.stages.config import FROM_SFT, RoleSection, RunConfig
from megachat.stages.results import (
    MODEL_FOLDER,
    RESULT_FILE,
    fingerprint,
    stored_fingerprint,
)
from megachat.telemetry.timers import PhaseTimers

if TYPE_CHECKING:  # they take seconds to import, and a dry run needs folders and layouts alone
    from megachat.data.tokenizer import Tokenizer
    from megachat.parallel.groups import ProcessGroups
    from megachat.telemetry.metrics import MetricsWriter, NullMetricsWriter

STAGE_TITLES: Mapping[Stage, str] = {
    Stage.SFT: "Supervised fine-tuning",
    Stage.REWARD: "Reward model",
    Stage.PROMPTS: "PPO",
}
STAGE_FOLDERS: Mapping[Stage, str] = {
    Stage.SFT: "sft",
    Stage.REWARD: "reward",
    Stage.PROMPTS: "rlhf",
}
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_RECORD = "tokenizer.fingerprint"
"""Beside the tokenizer's folder, written when that is complete: what it was made from."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a stage gets to work with; equal on every rank but for `worker`."""

    config: RunConfig
    worker: Worker
    tokenizer: "Tokenizer"
    _groups: dict[ParallelLayout, "ProcessGroups"] = field(default_factory=dict)

    def groups(self, role: RoleSection) -> "ProcessGroups":
        """The communicators of a role, created once per layout; a collective call."""
        from megachat.parallel.groups import ProcessGroups

        layout = role.layout(self.worker.world_size)
        if layout not in self._groups:
            self._groups[layout] = ProcessGroups.create(layout)
        return self._groups[layout]

    def folder(self, stage: Stage) -> Path:
        """Where a stage keeps its metrics, model and result."""
        return stage_folder(self.config, stage)

    def model_folder(self, stage: Stage) -> Path:
        """Where a stage leaves its HuggingFace model."""
        return self.folder(stage) / MODEL_FOLDER

    def source_folder(self, stage: Stage) -> Path:
        """Where later stages read the model of a stage."""
        return source_folder(self.config, stage)

    def open_metrics(self, stage: Stage) -> "MetricsWriter | NullMetricsWriter":
        """The metrics writer of a stage: real on rank 0, silent elsewhere."""
        from megachat.telemetry.metrics import open_metrics

        return open_metrics(self.folder(stage), rank=self.worker.rank)

    def timers(self) -> PhaseTimers:
        """Phase timers that wait for this worker's device."""
        return PhaseTimers(synchronize=self.synchronize)

    def synchronize(self) -> None:
        """Waits until this worker's device has done what it was told; the CPU always has."""
        if self.worker.device.type == "cuda":
            torch.cuda.synchronize(self.worker.device)

    def close(self) -> None:
        """Ends the communicators of all roles; all ranks call it alike."""
        for groups in self._groups.values():
            groups.close()
        self._groups.clear()


def stage_folder(config: RunConfig, stage: Stage) -> Path:
    """Where a stage keeps its metrics, model and result."""
    return config.run.output / STAGE_FOLDERS[stage]


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


def tokenizer_folder(config: RunConfig) -> Path:
    """Where the run keeps the tokenizer that all its models share."""
    return config.run.output / TOKENIZER_FOLDER


def tokenizer_fingerprint(config: RunConfig) -> str:
    """Hash of everything that determines the run's tokenizer."""
    section, source = config.tokenizer, tokenizer_source(config)
    if source is not None or section.train is None:
        return fingerprint({"path": source})
    data = config.data.model_dump(mode="json", exclude={"cache_dir"})
    return fingerprint({"train": section.train.model_dump(mode="json"), "data": data})


def stage_fingerprint(config: RunConfig, stage: Stage) -> str:
    """Hash of everything that determines a stage's output: its own settings and its inputs'.

    How the work is cut over processes and micro-batches, and who computes generation and
    log-probabilities, do not count: they change rounding only.
    """
    tree: dict[str, Any] = config.model_dump(mode="json")
    for role in tree["models"].values():
        for key in ("tensor", "pipeline", "sequence_parallel", "recompute", "micro_batch_rows"):
            del role[key]
    del tree["models"]["actor"]["logprob_backend"]
    for key in ("generation", "generation_tensor", "memory", "logprob_tolerance"):
        del tree["rlhf"][key]
    del tree["data"]["cache_dir"]
    parts = {key: tree[key] for key in ("tokenizer", "data")}
    parts |= {"seed": tree["run"]["seed"]} | _settings_of(config, stage, tree)
    if "actor" not in parts:
        parts["tokenizer_source"] = tokenizer_fingerprint(config)
    return fingerprint(parts)


def _settings_of(config: RunConfig, stage: Stage, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stage and of those that it starts from; of another run's, its result."""
    actor, reward = {"actor": tree["models"]["actor"]}, {"reward_role": tree["models"]["reward"]}
    found: dict[str, Any] = {
        Stage.SFT: actor | {"sft": tree["sft"]},
        Stage.REWARD: reward | {"reward": tree["reward"]},
        Stage.PROMPTS: actor | reward | {"rlhf": tree["rlhf"]},
    }[stage]
    for start in start_models(config, stage):
        if start.stage is None:
            continue
        if config.run.source_of(start.stage) is None:
            found |= _settings_of(config, start.stage, tree)
        else:
            result = source_folder(config, start.stage).parent / RESULT_FILE
            found[f"{start.stage}_from"] = stored_fingerprint(result)
    return found


def prepare_output(config: RunConfig) -> None:
    """Makes the run folder and the stage folders, so that nothing starts that cannot be written.

    Raises:
        ConfigError: The folder cannot be made or written.
    """
    output = config.run.output
    try:
        for stage in Stage:
            stage_folder(config, stage).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from error
    check_writable(output)


def check_writable(output: Path) -> None:
    """Makes sure that this process can write into the run folder.

    Raises:
        ConfigError: It cannot.
    """
    # Ranks in containers may share their process ids, and the folder.
    probe = output / f".writable.{uuid.uuid4().hex}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise _unwritable(output, error) from error


def _unwritable(output: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.output {output}: cannot write there ({error.strerror}): choose another folder"
    )
