"""The run: the stages that are asked for, in order, each skipped where its output is complete."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from megachat.checkpoint.checksums import check_small_files
from megachat.data.config import Stage
from megachat.data.stage_data import require_rows, training_texts
from megachat.data.tokenizer import Tokenizer, train_sentencepiece
from megachat.errors import CheckpointError, ConfigError
from megachat.hub import Content, local_folder
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
    stage_folder,
    tokenizer_folder,
)
from megachat.stages.inputs import Input, inputs_of
from megachat.stages.origin import (
    ORIGIN_FILE,
    InputContent,
    Origin,
    check_contents,
    data_inputs,
    model_inputs,
    read_origin,
    tokenizer_inputs,
    write_origin,
)
from megachat.stages.output import LOGS_FOLDER, claimed_output, start_afresh
from megachat.stages.results import (
    RESULT_FILE,
    StageMemory,
    StageResult,
    write_json,
    write_result,
)
from megachat.stages.reward import run_reward
from megachat.stages.rlhf import run_rlhf
from megachat.stages.row_counts import prepare_all_rows
from megachat.stages.scope import StageScope, stage_scope
from megachat.stages.settings import stage_settings, tokenizer_settings
from megachat.stages.sft import run_sft
from megachat.stages.shared import (
    Problem,
    check_inputs,
    check_output,
    raise_together,
)
from megachat.stages.starts import source_folder, tokenizer_source
from megachat.stages.status import completed_stages, has_tokenizer, require_inputs
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
    with claimed_output(config):
        _run_stages(worker, config, config.own_stages(stages), command)


def _run_stages(worker: Worker, config: RunConfig, stages: Sequence[Stage], command: str) -> None:
    """Runs stages in a folder that this run has for itself."""
    started = time.monotonic()
    check_output(worker, config)
    set_up_logging(config.run.output / LOGS_FOLDER, rank=worker.rank)
    done, inputs = on_first_rank(
        lambda: _open_run(config, stages), task="looking at what is complete"
    )
    to_run = [stage for stage in stages if stage not in done]
    prepare_backends(config, worker, to_run)
    on_first_rank(partial(require_rows, config.data, to_run), task="preparing the data")
    check_inputs(inputs)
    context = RunContext(config=config, worker=worker, tokenizer=prepare_tokenizer(config))
    on_first_rank(
        partial(prepare_all_rows, config, context.tokenizer, to_run),
        task="preparing the data of all stages",
    )
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {STAGE_TITLES[stage]}"
        done = on_first_rank(lambda: completed_stages(config), task="looking at what is complete")
        if stage in done:
            logger.info("%s: complete in %s, skipped", title, stage_folder(config, stage))
            continue
        data = on_first_rank(
            partial(_start_stage, config, stage, title), task=f"starting stage '{stage}'"
        )
        memory = PeakMemory(worker.device)
        with stage_scope(worker.device, synchronize=context.synchronize) as scope:
            result = _RUNNERS[stage](context, title, scope)
        peaks = all_gather_objects(memory.read())
        result = replace(result, memory=StageMemory.of_ranks(peaks))
        on_first_rank(
            partial(_finish_stage, context, stage, data, result),
            task=f"writing the result of stage '{stage}'",
        )
    on_first_rank(
        lambda: _report(config, command=command, duration_s=time.monotonic() - started),
        task="writing the report",
    )
    context.close()


def prepare_backends(config: RunConfig, worker: Worker, stages: Collection[Stage]) -> None:
    """Builds and loads the kernels of all stages, so that none is found missing after another.

    Raises:
        KernelError: They are for other devices, or cannot be built or loaded here.
    """
    if stages:
        prepare(config.models.actor.logprob_backend, worker.device)
    if Stage.PROMPTS in stages:
        prepare(config.rlhf.generation.backend, worker.device)


def _report(config: RunConfig, *, command: str, duration_s: float) -> None:
    # What draws takes half a second to import: not before the first step.
    from megachat.stages.summary import write_run_report

    done = completed_stages(config)
    write_run_report(config, done, command=command, duration_s=duration_s)


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


def _start_stage(config: RunConfig, stage: Stage, title: str) -> dict[str, InputContent]:
    """Makes a stage's folder ready for a new attempt; returns the data that this is made from.

    They are looked at now, and not when the stage ends: what changes meanwhile is of no effect.
    """
    folder = stage_folder(config, stage)
    if (folder / RESULT_FILE).is_file():
        logger.info("%s: runs again, since its model or one that it is made from is another", title)
    start_afresh(folder)
    return data_inputs(config)


def _finish_stage(
    context: RunContext, stage: Stage, data: Mapping[str, InputContent], result: StageResult
) -> None:
    """Leaves what a stage was made from and, last of all, its result."""
    config, folder = context.config, context.folder(stage)
    models = model_inputs(config, stage, read=context.models_read)
    settings = stage_settings(config, stage).values
    write_origin(folder / ORIGIN_FILE, Origin(settings=settings, inputs={**data, **models}))
    write_result(folder, result)


def _make_tokenizer(config: RunConfig) -> str:
    """Trains or copies the run's tokenizer where it is not there yet; returns its fingerprint."""
    folder = tokenizer_folder(config)
    if has_tokenizer(config):
        _check_tokenizer(config)
    else:
        section, source = config.tokenizer, tokenizer_source(config)
        inputs = tokenizer_inputs(config)
        if source is not None:
            there = local_folder(source, Content.TOKENIZER)
            check_small_files(there)
            made = Tokenizer.load(there)
        else:
            assert section.train is not None, "there is a source or a training"
            logger.info("training a tokenizer of %d pieces", section.train.vocab_size)
            made = train_sentencepiece(training_texts(config.data), section.train, folder)
        made.save(folder, chat=config.data.chat)
        settings = tokenizer_settings(config).values
        made_as = Tokenizer.load(folder).fingerprint
        origin = Origin(settings=settings, inputs=inputs, made=made_as)
        write_origin(config.run.output / TOKENIZER_RECORD, origin)
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


def _check_tokenizer(config: RunConfig) -> None:
    """Compares the tokenizer in the run folder with what it is a copy of, and with what it was.

    Raises:
        ConfigError: One of them is another one now.
    """
    folder, recorded = tokenizer_folder(config), read_origin(config.run.output / TOKENIZER_RECORD)
    assert recorded is not None, "a tokenizer that is there has a record"
    check_contents(folder, tokenizer_inputs(config), recorded)
    if Tokenizer.load(folder).fingerprint != recorded.made:
        raise ConfigError(
            f"{folder}: not the tokenizer that this run made there: put that back, choose another "
            "run.output, or delete the folder to make it anew"
        )


def _open_run(
    config: RunConfig, stages: Sequence[Stage]
) -> tuple[dict[Stage, StageResult], tuple[Input, ...]]:
    """What is complete and what is read, if the stages can start from it.

    Leaves the configuration in the folder.
    """
    done = completed_stages(config)
    require_inputs(config, done, stages)
    write_json(config.run.output / "config.json", config.model_dump(mode="json"))
    return done, inputs_of(config, [stage for stage in stages if stage not in done])
