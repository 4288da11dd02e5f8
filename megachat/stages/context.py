"""The one place for what all stages of a run share: worker, folders, tokenizer, process groups."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megachat.data.cache import DIGESTS_FOLDER
from megachat.data.config import Stage
from megachat.digests import FileDigests, FilesState
from megachat.errors import ConfigError
from megachat.parallel.launch import Worker
from megachat.parallel.layout import ParallelLayout
from megachat.stages.config import RoleSection, RunConfig
from megachat.stages.results import MODEL_FOLDER, fingerprint
from megachat.stages.settings import stage_settings
from megachat.stages.starts import STAGE_FOLDERS, source_folder
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
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_RECORD = "tokenizer.made_from.json"
"""Beside the tokenizer's folder, written when that is complete: what it was made from."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a stage gets to work with; equal on every rank but for `worker`."""

    config: RunConfig
    worker: Worker
    tokenizer: "Tokenizer"
    _groups: dict[ParallelLayout, "ProcessGroups"] = field(default_factory=dict)
    _models: dict[Path, str] = field(default_factory=dict)

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

    def note_model(self, folder: Path, digest: str, *, state: FilesState) -> None:
        """Remembers which model was read from a folder, so that nobody reads it again to know.

        Args:
            folder: Of the model.
            digest: What was read.
            state: Of its files before they were read.
        """
        self._models[folder] = digest
        known_digests(self.config).keep(state, digest)

    @property
    def models_read(self) -> Mapping[Path, str]:
        """Digests of the models that were read in this run, on the first rank."""
        return self._models

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


def tokenizer_folder(config: RunConfig) -> Path:
    """Where the run keeps the tokenizer that all its models share."""
    return config.run.output / TOKENIZER_FOLDER


def known_digests(config: RunConfig) -> FileDigests:
    """What this machine knows of the content of files."""
    return FileDigests(config.data.cache_dir / DIGESTS_FOLDER)


def stage_fingerprint(config: RunConfig, stage: Stage) -> str:
    """Hash of the settings that determine a stage's output."""
    return fingerprint(stage_settings(config, stage).values)


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
