"""Says what a run will do and which of its stages are done, without the modules that train."""

from megachat.data.config import Stage
from megachat.stages.config import RunConfig
from megachat.stages.context import source_folder, stage_fingerprint, stage_folder
from megachat.stages.inputs import describe_inputs, inputs_of
from megachat.stages.results import MODEL_FOLDER, StageResult, read_result


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
    """The results of this run's own stages whose outputs are all there.

    Raises:
        CheckpointError: A result file is not one.
        ConfigError: A stage, asked for or not, was completed under another configuration.
    """
    done: dict[Stage, StageResult] = {}
    for stage in Stage:
        if config.run.source_of(stage) is not None:
            continue
        folder = stage_folder(config, stage)
        result = read_result(folder, expected_fingerprint=stage_fingerprint(config, stage))
        if result is None:
            continue
        from megachat.checkpoint.huggingface import is_complete  # seconds, where nothing is done

        if is_complete(folder / MODEL_FOLDER):
            done[stage] = result
    return done
