"""The one place for what a stage leaves behind: its result file, by which a run can skip it."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megachat.errors import CheckpointError, ConfigError
from megachat.parallel.peak_memory import MemoryPeak

RESULT_FILE = "result.json"
MODEL_FOLDER = "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One held-out prompt and what the policy made of it."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReshardCost:
    """What a change from training to generation weights took, mean of `count` changes.

    Of each change the slowest rank and the rank with the most bytes count.
    """

    train: str
    """Layout."""
    generate: str
    """Layout."""
    count: int
    seconds: float
    received_bytes: float
    redundant_bytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """The most memory that the ranks of a stage had at once."""

    least_bytes: int
    """Of the rank that needed least."""
    most_bytes: int
    most_rank: int
    """The first rank that needed so much."""
    measure: str
    """What was counted."""

    @classmethod
    def of_ranks(cls, peaks: Sequence[MemoryPeak]) -> "StageMemory":
        """From the peaks of all ranks, in their order."""
        sizes = [peak.num_bytes for peak in peaks]
        most = max(sizes)
        return cls(
            least_bytes=min(sizes),
            most_bytes=most,
            most_rank=sizes.index(most),
            measure=", or ".join(dict.fromkeys(peak.measure.value for peak in peaks)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """The outcome of a completed stage."""

    fingerprint: str
    """Of the configuration that determined it."""
    seconds: float
    metrics: dict[str, float]
    """Figures for the summary, by name."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)
    reshard: ReshardCost | None = None
    """Of a stage that generates."""
    memory: StageMemory | None = None
    """None where an older version of megachat ran the stage."""


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Hash of the configuration values that determine a stage's output."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically.

    Raises:
        ConfigError: The folder cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: a reader sees the old file or the new one.

    Raises:
        ConfigError: The folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot write: {error.strerror}") from error


def write_result(folder: Path, result: StageResult) -> None:
    """Leaves a stage's result; the last thing a stage does."""
    write_json(folder / RESULT_FILE, asdict(result))


def stored_fingerprint(path: Path) -> str | None:
    """The fingerprint in a result file; None where there is no such file or it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return str(found)


def read_result(folder: Path, *, expected_fingerprint: str) -> StageResult | None:
    """The result of a completed stage, or None where the stage has not completed.

    Raises:
        CheckpointError: The file is not a result.
        ConfigError: The stage was completed under another configuration.
    """
    path = folder / RESULT_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        replies = [Reply(**reply) for reply in values.pop("replies")]
        reshard, memory = values.pop("reshard", None), values.pop("memory", None)
        result = StageResult(
            replies=replies,
            reshard=None if reshard is None else ReshardCost(**reshard),
            memory=None if memory is None else StageMemory(**memory),
            **values,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a stage result ({error}): delete the folder {folder} to run it again"
        ) from error
    if result.fingerprint != expected_fingerprint:
        raise ConfigError(
            f"{folder}: completed under another configuration ({result.fingerprint}, now "
            f"{expected_fingerprint}): choose another run.output or delete the folder"
        )
    return result
