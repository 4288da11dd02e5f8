"""The run: the stages that are asked for, in order, each skipped where its output is complete."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from megachat.checkpoint.huggingface import is_complete
from megachat.data.config import Stage
from megachat.data.stage_data import training_texts
from megachat.data.tokenizer import Tokenizer, train_sentencepiece
from megachat.errors import CheckpointError, ConfigError
from megachat.ops.backends import prepare
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.handover import on_first_rank
from megachat.parallel.launch import Worker
from megachat.parallel.peak_memory import PeakMemory
from megachat.stages.config import RunConfig
from megachat.stages.context import (
    STAGE_TITLES,
    TOKENIZER_RECORD,
    RunContext,
    source_folder,
    stage_folder,
    start_models,
    tokenizer_fingerprint,
    tokenizer_folder,
    tokenizer_source,
)
from megachat.stages.inputs import Input, inputs_of
from megachat.stages.results import (
    RESULT_FILE,
    StageMemory,
    StageResult,
    write_json,
    write_result,
    write_text,
)
from megachat.stages.reward import run_reward
from megachat.stages.rlhf import run_rlhf
from megachat.stages.scope import StageScope, stage_scope
from megachat.stages.sft import run_sft
from megachat.stages.shared import (
    Problem,
    check_inputs,
    check_output,
    raise_together,
)
from megachat.stages.status import completed_stages
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
        stages: What to do, in order, but for those whose models are taken from other runs; what
            they start from must be complete.
        command: The command line, for the report.
    """
    started, stages = time.monotonic(), config.own_stages(stages)
    check_output(worker, config)
    set_up_logging(config.run.output / "logs", rank=worker.rank)
    prepare(config.models.actor.logprob_backend, worker.device)
    done, inputs = on_first_rank(
        lambda: _open_run(config, stages), task="looking at what is complete"
    )
    check_inputs(inputs)
    context = RunContext(config=config, worker=worker, tokenizer=prepare_tokenizer(config))
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
        on_first_rank(
            partial(write_result, context.folder(stage), result),
            task=f"writing the result of stage '{stage}'",
        )
    on_first_rank(
        lambda: write_run_report(config, command=command, duration_s=time.monotonic() - started),
        task="writing the report",
    )
    context.close()


def prepare_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer in the run folder, trained or copied there by the first rank.

    Training takes minutes on a large corpus, so the others wait outside any collective.

    Raises:
        CheckpointError: The tokenizer cannot be found, or a rank reads another one than the first.
        ConfigError: The folder holds one that was made under another configuration.
        DataError: There is nothing to train it on, or it breaks a rule.
    """
    folder = tokenizer_folder(config)
    expected = on_first_rank(lambda: _make_tokenizer(config), task="making the tokenizer")
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
        section, source = config.tokenizer, tokenizer_source(config)
        if source is not None:
            Tokenizer.load(source).save(folder)
        else:
            assert section.train is not None, "there is a source or a training"
            logger.info("training a tokenizer of %d pieces", section.train.vocab_size)
            train_sentencepiece(training_texts(config.data), section.train, folder)
        write_text(config.run.output / TOKENIZER_RECORD, tokenizer_fingerprint(config))
    tokenizer = Tokenizer.load(folder)
    _check_sources(config, tokenizer)
    return tokenizer.fingerprint


def _check_sources(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Compares the run's tokenizer with those of the runs that it takes models from.

    Raises:
        ConfigError: They differ; names both.
    """
    for stage in Stage:
        if config.run.source_of(stage) is None:
            continue
        other = Tokenizer.load(source_folder(config, stage))
        if other.fingerprint != tokenizer.fingerprint:
            here = tokenizer_source(config) or "trained on data.sources"
            raise ConfigError(
                f"run.{stage}_from: the model in {other.origin} was made with another tokenizer "
                f"({other.vocab_size} ids) than this run's ({here}, {tokenizer.vocab_size} ids): "
                "all models of a run share one"
            )


def _open_run(
    config: RunConfig, stages: Sequence[Stage]
) -> tuple[dict[Stage, StageResult], tuple[Input, ...]]:
    """What is complete and what is read, if the stages can start from it.

    Leaves the configuration in the folder.
    """
    done = completed_stages(config)
    _require_inputs(config, done, stages)
    write_json(config.run.output / "config.json", config.model_dump(mode="json"))
    return done, inputs_of(config, [stage for stage in stages if stage not in done])


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


def _require_inputs(
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
    folder = source_folder(config, stage)
    return (folder.parent / RESULT_FILE).is_file() and is_complete(folder)
