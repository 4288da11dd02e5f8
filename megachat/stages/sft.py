"""Step 1, supervised fine-tuning: next-token training on the answers people gave."""

import math
import time
from collections.abc import Iterable

from megachat.data.config import Stage
from megachat.data.loaders import LoaderOptions, SftLoader, endless
from megachat.model.config import Head
from megachat.ops.finite import require_number
from megachat.ops.registry import Backend
from megachat.parallel.rng import seed_for
from megachat.records import SftBatch
from megachat.rlhf.objectives import SftObjective
from megachat.stages.context import RunContext, stage_fingerprint
from megachat.stages.data_rows import prepare_rows
from megachat.stages.finite import at
from megachat.stages.loop import (
    export,
    held_out_batches,
    plan_steps,
    warn_of_long_warmup,
)
from megachat.stages.results import StageResult
from megachat.stages.roles import start_model
from megachat.stages.scope import StageScope
from megachat.stages.skipped import SkippedUpdates
from megachat.telemetry.progress import StageProgress
from megachat.training.engine import ForwardEngine, TrainEngine

_LARGEST_EXPONENT = 709.0
"""What `math.exp` takes."""


def run_sft(context: RunContext, progress_title: str, scope: StageScope) -> StageResult:
    """Trains the supervised model and exports it as a HuggingFace folder."""
    started = time.monotonic()
    config, role = context.config.sft, context.config.models.actor
    data = prepare_rows(context, Stage.SFT)
    loader = SftLoader(
        data.train,
        LoaderOptions(
            batch_size=config.batch_rows,
            seed=context.config.run.seed,
            bucket_window=config.bucket_window,
        ),
    )
    held_out = held_out_batches(SftLoader, data.validation, count=config.evaluation_rows)
    options = role.options(dropout=config.dropout, attention_dropout=config.attention_dropout)
    model = start_model(context, role, head=Head.LANGUAGE_MODEL, options=options)
    num_steps = plan_steps(Stage.SFT, config, steps_per_epoch=len(loader))
    warn_of_long_warmup(Stage.SFT, {"optimizer": config.optimizer}, num_updates=num_steps)
    engine = scope.own(
        TrainEngine(
            model,
            micro_batch_rows=role.micro_batch_rows,
            optimizer=config.optimizer,
            total_steps=num_steps,
            seed=seed_for(context.config.run.seed, Stage.SFT),
        )
    )
    skipped = SkippedUpdates(context, Stage.SFT, {"actor": engine})
    backend = role.logprob_backend
    with at(f"{Stage.SFT} before training"):
        before = perplexity(engine, held_out, backend=backend)
    with (
        context.open_metrics(Stage.SFT) as metrics,
        StageProgress(progress_title, total=num_steps) as progress,
    ):
        for step, batch in zip(range(num_steps), endless(loader), strict=False):
            with at(f"{Stage.SFT} step {step}"):
                report = engine.forward_backward(batch, _objective(engine, batch, backend))
                require_number(report.loss, what="loss of the actor")
            update = engine.step()
            values = {
                "sft/loss": report.loss,
                "sft/token_accuracy": report.metrics["token_accuracy"],
                "sft/gradient_norm": update.gradient_norm,
                "sft/learning_rate": update.learning_rate,
                "sft/skipped_steps": skipped.total,
            }
            metrics.write(step, values)
            skipped.check(step)
            progress.advance(values)
        skipped.conclude()
        with at(f"{Stage.SFT} after training"):
            after = perplexity(engine, held_out, backend=backend)
            export(context, Stage.SFT, model, role="actor")
        if after is not None:
            metrics.write(num_steps, {"sft/perplexity": after})
    return StageResult(
        fingerprint=stage_fingerprint(context.config, Stage.SFT),
        seconds=time.monotonic() - started,
        ended_by=config.step_limit(len(loader)),
        metrics={
            "perplexity_before": before,
            "perplexity_after": after,
            "steps": num_steps,
            "skipped_steps": skipped.total,
        },
    )


def perplexity(
    engine: ForwardEngine, batches: Iterable[SftBatch], *, backend: Backend = Backend.REFERENCE
) -> float | None:
    """Exp of the mean negative log-likelihood over all target tokens of the batches.

    Args:
        engine: Runs the language model.
        batches: Rows and their targets.
        backend: Who computes the log-probabilities.

    Returns:
        None where there is no target.

    Raises:
        DivergenceError: It is no finite number.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        num_targets = int(batch.loss_mask[:, 1:].sum())
        total += engine.evaluate(batch, _objective(engine, batch, backend)).loss * num_targets
        tokens += num_targets
    if not tokens:
        return None
    mean = require_number(total / tokens, what="held-out loss of the actor")
    value = math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf
    return require_number(value, what="held-out perplexity of the actor")


def _objective(engine: ForwardEngine, batch: SftBatch, backend: Backend) -> SftObjective:
    return SftObjective.for_batch(
        batch, group=engine.groups.tensor, vocab_start=engine.vocab_start, backend=backend
    )
