"""The run: the stages that are asked for, in order, each skipped where its output is complete."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from megachat.checkpoint.huggingface import is_complete
from megachat.data.config import Stage
from megachat.data.stage_data import training_texts
from megachat.data.tokenizer import Tokenizer, train_sentencepiece
from megachat.errors import CheckpointError, ConfigError
from megachat.ops.backends import prepare
from megachat.parallel.collectives import barrier
from megachat.parallel.launch import Worker
from megachat.stages.config import RunConfig
from megachat.stages.context import (
    STAGE_TITLES,
    TOKENIZER_RECORD,
    RunContext,
    stage_fingerprint,
    stage_folder,
    tokenizer_fingerprint,
    tokenizer_folder,
)
from megachat.stages.inputs import Input, describe_inputs, inputs_of
from megachat.stages.results import (
    MODEL_FOLDER,
    StageResult,
    read_result,
    write_json,
    write_result,
    write_text,
)
from megachat.stages.reward import run_reward
from megachat.stages.rlhf import run_rlhf
from megachat.stages.sft import run_sft
from megachat.stages.shared import (
    Problem,
    check_inputs,
    check_output,
    raise_together,
    told_by_first,
)
from megachat.stages.summary import write_run_report
from megachat.telemetry.log import set_up_logging

logger = logging.getLogger(__name__)

_RUNNERS: Mapping[Stage, Callable[[RunContext, str], StageResult]] = {
    Stage.SFT: run_sft,
    Stage.REWARD: run_reward,
    Stage.PROMPTS: run_rlhf,
}


def run_stages(worker: Worker, config: RunConfig, stages: Sequence[Stage], command: str) -> None:
    """Runs stages on this rank; all ranks call it alike.

    Args:
        worker: This rank.
        config: The run.
        stages: What to do, in order; stages before the first must be complete.
        command: The command line, for the report.
    """
    started = time.monotonic()
    check_output(worker, config)
    set_up_logging(config.run.output / "logs", rank=worker.rank)
    prepare(config.models.actor.logprob_backend, worker.device)
    done, inputs = told_by_first(worker, lambda: _open_run(config, stages))
    check_inputs(worker, inputs)
    context = RunContext(config=config, worker=worker, tokenizer=prepare_tokenizer(worker, config))
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {STAGE_TITLES[stage]}"
        if stage in done:
            logger.info("%s: complete in %s, skipped", title, stage_folder(config, stage))
            continue
        result = _RUNNERS[stage](context, title)
        if worker.rank == 0:
            write_result(context.folder(stage), result)
        barrier()
    if worker.rank == 0:
        write_run_report(config, command=command, duration_s=time.monotonic() - started)
    barrier()


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


def prepare_tokenizer(worker: Worker, config: RunConfig) -> Tokenizer:
    """The tokenizer in the run folder, trained or copied there by the first rank.

    Raises:
        CheckpointError: The tokenizer cannot be found, or a rank reads another one than the first.
        ConfigError: The folder holds one that was made under another configuration.
        DataError: There is nothing to train it on, or it breaks a rule.
    """
    folder = tokenizer_folder(config)
    expected = told_by_first(worker, lambda: _make_tokenizer(config))
    tokenizer = Tokenizer.load(folder)
    problem = Problem(
        what=f"{folder}: read as another tokenizer than on rank 0",
        remedy="the file system shows its nodes different files: start again",
        error=CheckpointError,
    )
    raise_together(None if tokenizer.fingerprint == expected else problem)
    return tokenizer


def _make_tokenizer(config: RunConfig) -> str:
    """Trains or copies the run's tokenizer where it is not there yet; returns its fingerprint."""
    folder = tokenizer_folder(config)
    if not _has_tokenizer(config):
        section = config.tokenizer
        if section.train is not None:
            logger.info("training a tokenizer of %d pieces", section.train.vocab_size)
            train_sentencepiece(training_texts(config.data), section.train, folder)
        else:
            Tokenizer.load(section.path or config.models.actor.model or "").save(folder)
        write_text(config.run.output / TOKENIZER_RECORD, tokenizer_fingerprint(config))
    return Tokenizer.load(folder).fingerprint


def _open_run(
    config: RunConfig, stages: Sequence[Stage]
) -> tuple[dict[Stage, StageResult], tuple[Input, ...]]:
    """What is complete and what is read, if the stages can start from it.

    Leaves the configuration in the folder.
    """
    done = completed_stages(config)
    _require_inputs(config, done, first=stages[0])
    write_json(config.run.output / "config.json", config.model_dump(mode="json"))
    return done, inputs_of(config, [stage for stage in stages if stage not in done])


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
        if result is not None and is_complete(folder / MODEL_FOLDER):
            done[stage] = result
    return done


def _has_tokenizer(config: RunConfig) -> bool:
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


def _require_inputs(config: RunConfig, done: Mapping[Stage, StageResult], *, first: Stage) -> None:
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
