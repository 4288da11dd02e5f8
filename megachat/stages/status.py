"""Says what a run will do and which of its stages are done, without the modules that train."""

from collections.abc import Mapping, Sequence

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
from megachat.stages.results import MODEL_FOLDER, RESULT_FILE, StageResult, read_result
from megachat.stages.settings import tokenizer_settings
from megachat.stages.starts import source_folder, start_models, tokenizer_source


def describe_run(config: RunConfig) -> str:
    """The resolved configuration as JSON and the layouts of the roles, for `--dry-run`."""
    world_size, done = config.launch.world_size, completed_stages(config)
    lines = [config.model_dump_json(indent=2), f"ranks: {world_size}"]
    for name, role in (("actor", config.models.actor), ("reward", config.models.reward)):
        lines.append(f"layout of {name}: {role.layout(world_size)}")
    for stage in Stage:
        state, folder = "complete" if stage in done else "to run", stage_folder(config, stage)
        if config.run.source_of(stage) is not None:
            state, folder = "taken from another run", source_folder(config, stage)
        lines.append(f"stage {stage}: {state} ({folder})")
    to_run = [stage for stage in config.own_stages(list(Stage)) if stage not in done]
    lines += describe_inputs(inputs_of(config, to_run))
    return "\n".join(lines)


def completed_stages(config: RunConfig) -> dict[Stage, StageResult]:
    """The results of this run's own stages whose outputs are all there and what they would be now.

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
        if config.run.source_of(stage) is not None:
            continue
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


def require_inputs(
    config: RunConfig, done: Mapping[Stage, StageResult], stages: Sequence[Stage]
) -> None:
    """Checks that what the stages start from is there or is made by a stage before them.

    Raises:
        CheckpointError: It is not: an earlier stage or another run has not left its model.
    """
    made = set(done)
    for stage in stages:
        for start in start_models(config, stage) if stage not in done else ():
            if start.stage is None or start.stage in made:
                continue
            other = config.run.source_of(start.stage)
            if other is None:
                raise CheckpointError(
                    f"{stage_folder(config, start.stage)}: the output of stage '{start.stage}' is "
                    f"missing or incomplete, and stage '{stage}' needs it: run that stage first, "
                    f"or name another run by run.{start.stage}_from"
                )
            if not _is_finished(config, start.stage):
                raise CheckpointError(
                    f"run.{start.stage}_from {other}: {start.name} is missing or incomplete, and "
                    f"stage '{stage}' starts from it: finish that run or name another"
                )
        made.add(stage)


def _is_finished(config: RunConfig, stage: Stage) -> bool:
    """Whether another run has left its model."""
    from megachat.checkpoint.huggingface import is_complete  # likewise

    folder = source_folder(config, stage)
    return (folder.parent / RESULT_FILE).is_file() and is_complete(folder)


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
    if tokenizer_source(config) is None:
        check_contents(folder, tokenizer_inputs(config), recorded)
    return True
