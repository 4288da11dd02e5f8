"""Says what a run will do and which of its stages are done, without the modules that train."""

from collections.abc import Mapping

from megachat.data.config import Stage
from megachat.errors import CheckpointError
from megachat.stages.config import RunConfig
from megachat.stages.context import TOKENIZER_RECORD, stage_folder, tokenizer_folder
from megachat.stages.inputs import describe_inputs, inputs_of
from megachat.stages.origin import (
    check_contents,
    check_settings,
    check_stage,
    read_origin,
    stages_before,
    tokenizer_inputs,
)
from megachat.stages.results import MODEL_FOLDER, StageResult, read_result
from megachat.stages.settings import tokenizer_settings


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
    """The results of the stages whose outputs are all there and are what they would be now.

    A stage that was made from another model than the stages before it have left is not complete:
    it has to be run again. So is one whose earlier stages are to be run again, until their models
    turn out to be the same.

    Raises:
        CheckpointError: A result or record is not one.
        ConfigError: A stage, asked for or not, was completed under another configuration, or from
            other data or another start model.
    """
    done: dict[Stage, StageResult] = {}
    for stage in Stage:
        folder = stage_folder(config, stage)
        result = read_result(folder)
        if result is None:
            continue
        from megachat.checkpoint.huggingface import is_complete  # seconds, where nothing is done

        is_current = check_stage(config, stage)
        has_inputs = all(before in done for before in stages_before(config, stage))
        if is_current and has_inputs and is_complete(folder / MODEL_FOLDER):
            done[stage] = result
    return done


def require_inputs(config: RunConfig, done: Mapping[Stage, StageResult], *, first: Stage) -> None:
    """Checks that the stages whose models the first one to run reads have left them.

    Raises:
        CheckpointError: One of them has not.
    """
    for stage in stages_before(config, first):
        if stage not in done:
            raise CheckpointError(
                f"{stage_folder(config, stage)}: the output of stage '{stage}' is missing or "
                f"incomplete, and stage '{first}' needs it: run that stage first"
            )


def has_tokenizer(config: RunConfig) -> bool:
    """Whether the run folder holds the tokenizer of this configuration and these data.

    Raises:
        ConfigError: It holds that of others; names the keys or files.
        CheckpointError: The record of it is broken.
    """
    folder, recorded = tokenizer_folder(config), read_origin(config.run.output / TOKENIZER_RECORD)
    if not (folder / "tokenizer.json").is_file() or recorded is None:
        return False
    check_settings(folder, tokenizer_settings(config), recorded)
    if config.tokenizer.train is not None:
        check_contents(folder, tokenizer_inputs(config), recorded)
    return True
