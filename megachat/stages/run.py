"""The run: the stages that are asked for, in order, each skipped where its output is complete."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megachat.checkpoint.huggingface import is_complete
from megachat.data.config import Stage
from megachat.data.stage_data import training_texts
from megachat.data.tokenizer import Tokenizer, train_sentencepiece
from megachat.errors import CheckpointError, ConfigError
from megachat.hub import local_folder
from megachat.ops.backends import prepare
from megachat.parallel.collectives import all_gather_objects, barrier
from megachat.parallel.launch import Worker
from megachat.parallel.peak_memory import PeakMemory
from megachat.stages.config import RunConfig
from megachat.stages.context import (
    STAGE_TITLES,
    TOKENIZER_RECORD,
    RunContext,
    prepare_output,
    stage_fingerprint,
    stage_folder,
    tokenizer_fingerprint,
    tokenizer_folder,
)
from megachat.stages.results import (
    MODEL_FOLDER,
    StageMemory,
    StageResult,
    read_result,
    write_json,
    write_result,
    write_text,
)
from megachat.stages.reward import run_reward
from megachat.stages.rlhf import run_rlhf
from megachat.stages.scope import StageScope, stage_scope
from megachat.stages.sft import run_sft
from megachat.stages.summary import write_run_report
from megachat.telemetry.log import set_up_logging

logger = logging.getLogger(__name__)

_RUNNERS: Mapping[Stage, Callable[[RunContext, str, StageScope], StageResult]] = {
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
    prepare_output(config)
    set_up_logging(config.run.output / "logs", rank=worker.rank)
    prepare(config.models.actor.logprob_backend, worker.device)
    done = completed_stages(config)
    _require_inputs(config, done, first=stages[0])
    if worker.rank == 0:
        write_json(config.run.output / "config.json", config.model_dump(mode="json"))
    context = RunContext(config=config, worker=worker, tokenizer=prepare_tokenizer(worker, config))
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {STAGE_TITLES[stage]}"
        if stage in done:
            logger.info("%s: complete in %s, skipped", title, stage_folder(config, stage))
            continue
        memory = PeakMemory(worker.device)
        with stage_scope(worker.device, synchronize=context.synchronize) as scope:
            result = _RUNNERS[stage](context, title, scope)
        peaks = all_gather_objects(memory.read())
        result = replace(result, memory=StageMemory.of_ranks(peaks))
        if worker.rank == 0:
            write_result(context.folder(stage), result)
        barrier()
    if worker.rank == 0:
        write_run_report(config, command=command, duration_s=time.monotonic() - started)
    barrier()
    context.close()


def describe_run(config: RunConfig) -> str:
    """The resolved configuration as JSON and the layouts of the roles, for `--dry-run`."""
    world_size, done = config.launch.world_size, completed_stages(config)
    lines = [config.model_dump_json(indent=2), f"ranks: {world_size}"]
    for name, role in (("actor", config.models.actor), ("reward", config.models.reward)):
        lines.append(f"layout of {name}: {role.layout(world_size)}")
    for stage in Stage:
        state = "complete" if stage in done else "to run"
        lines.append(f"stage {stage}: {state} ({stage_folder(config, stage)})")
    return "\n".join(lines)


def prepare_tokenizer(worker: Worker, config: RunConfig) -> Tokenizer:
    """The tokenizer in the run folder, trained or copied there by the first rank.

    Raises:
        CheckpointError: The tokenizer cannot be found.
        ConfigError: The folder holds one that was made under another configuration.
        DataError: There is nothing to train it on, or it breaks a rule.
    """
    folder = tokenizer_folder(config)
    if worker.rank == 0 and not _has_tokenizer(config):
        section = config.tokenizer
        if section.train is not None:
            logger.info("training a tokenizer of %d pieces", section.train.vocab_size)
            train_sentencepiece(training_texts(config.data), section.train, folder)
        else:
            source = section.path or str(local_folder(config.models.actor.model or ""))
            Tokenizer.load(source).save(folder)
        write_text(config.run.output / TOKENIZER_RECORD, tokenizer_fingerprint(config))
    barrier()
    return Tokenizer.load(folder)


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
