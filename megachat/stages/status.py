"""Says what a run will do and which of its stages are done, without the modules that train."""

from collections.abc import Mapping

from megachat.data.config import Stage
from megachat.errors import CheckpointError, ConfigError
from megachat.stages.config import RunConfig
from megachat.stages.context import (
    TOKENIZER_RECORD,
    stage_fingerprint,
    stage_folder,
    tokenizer_fingerprint,
    tokenizer_folder,
)
from megachat.stages.inputs import describe_inputs, inputs_of
from megachat.stages.results import MODEL_FOLDER, StageResult, read_result


def describe_run(config: RunConfig) -> str:
    """The resolved configuration as JSON and the layouts of the roles, for `--dry-run`."""
    world_size, done = config.launch.world_size, completed_stages(config)
    lines = [config.model_dump_json(indent=2), f"ranks: {world_size}"]
    for name, role in (("actor", config.models.actor), ("reward", config.models.reward)):
        lines.append(f"layout of {name}: {role.layout(world_size)}")
    for stage in Stage:
        state = "complete" if stage in done else "to run"
        lines.append(f"stage {stage}: {state} ({stage_folder(config, stage)})")
    lines += describe_inputs(inputs_of(config, [stage for stage in Stage if stage not in done]))
    return "\n".join(lines)


def completed_stages(config: RunConfig) -> dict[Stage, StageResult]:
    """The results of the stages whose outputs are all there.

    Raises:
        CheckpointError: A result file is not one.
        ConfigError: A stage, asked for or not, was completed under another configuration.
    """
    done: dict[Stage, StageResult] = {}
    for stage in Stage:
        folder = stage_folder(config, stage)
        result = read_result(folder, expected_fingerprint=stage_fingerprint(config, stage))
        if result is None:
            continue
        from megachat.checkpoint.huggingface import is_complete  # seconds, where nothing is done

        if is_complete(folder / MODEL_FOLDER):
            done[stage] = result
    return done


def require_inputs(config: RunConfig, done: Mapping[Stage, StageResult], *, first: Stage) -> None:
    """Checks that the stages before the first one to run have left their models.

    Raises:
        CheckpointError: One of them has not.
    """
    for stage in Stage:
        if stage is first:
            return
        if stage not in done:
            raise CheckpointError(
                f"{stage_folder(config, stage)}: the output of stage '{stage}' is missing or "
                f"incomplete, and stage '{first}' needs it: run that stage first"
            )


def has_tokenizer(config: RunConfig) -> bool:
    """Whether the run folder holds the tokenizer of this configuration.

    Raises:
        ConfigError: It holds that of another one.
    """
    folder, record = tokenizer_folder(config), config.run.output / TOKENIZER_RECORD
    if not (folder / "tokenizer.json").is_file() or not record.is_file():
        return False
    if record.read_text(encoding="utf-8") != tokenizer_fingerprint(config):
        raise ConfigError(
            f"{folder}: made under another configuration of tokenizer or data: choose another "
            "run.output or delete the folder"
        )
    return True
