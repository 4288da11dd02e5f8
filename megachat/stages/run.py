"""The run: the stages that are asked for, in order, each skipped where its output is complete."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from megachat.data.config import Stage
from megachat.data.stage_data import training_texts
from megachat.data.tokenizer import Tokenizer, train_sentencepiece
from megachat.errors import CheckpointError
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
    tokenizer_fingerprint,
    tokenizer_folder,
)
from megachat.stages.inputs import Input, inputs_of
from megachat.stages.results import (
    StageMemory,
    StageResult,
    write_json,
    write_result,
    write_text,
)
from megachat.stages.reward import run_reward
from megachat.stages.rlhf import run_rlhf
from megachat.stages.rows import prepare_rows
from megachat.stages.scope import StageScope, stage_scope
from megachat.stages.sft import run_sft
from megachat.stages.shared import (
    Problem,
    check_inputs,
    check_output,
    raise_together,
)
from megachat.stages.status import completed_stages, has_tokenizer, require_inputs
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
    check_output(worker, config)
    set_up_logging(config.run.output / "logs", rank=worker.rank)
    done, inputs = on_first_rank(
        lambda: _open_run(config, stages), task="looking at what is complete"
    )
    to_run = [stage for stage in stages if stage not in done]
    prepare_backends(config, worker, to_run)
    check_inputs(inputs)
    context = RunContext(config=config, worker=worker, tokenizer=prepare_tokenizer(config))
    on_first_rank(
        partial(prepare_rows, config, context.tokenizer, to_run),
        task="preparing the data of all stages",
    )
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


def prepare_backends(config: RunConfig, worker: Worker, stages: Collection[Stage]) -> None:
    """Builds and loads the kernels of all stages, so that none is found missing after another.

    Raises:
        KernelError: They are for other devices, or cannot be built or loaded here.
    """
    if stages:
        prepare(config.models.actor.logprob_backend, worker.device)
    if Stage.PROMPTS in stages:
        prepare(config.rlhf.generation.backend, worker.device)


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
    if not has_tokenizer(config):
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
    require_inputs(config, done, first=stages[0])
    write_json(config.run.output / "config.json", config.model_dump(mode="json"))
    return done, inputs_of(config, [stage for stage in stages if stage not in done])
