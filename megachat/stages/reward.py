"""Step 2, the reward model: which of two answers a person prefers."""

import time
from collections.abc import Iterable

from megachat.checkpoint.huggingface import MissingHead
from megachat.data.config import Stage
from megachat.data.loaders import LoaderOptions, PreferenceLoader, endless
from megachat.model.config import Head
from megachat.model.opt import OptModel
from megachat.ops.finite import require_number
from megachat.parallel.rng import seed_for
from megachat.records import PreferenceBatch
from megachat.rlhf.objectives import PairwiseObjective, TokenwisePairwiseObjective
from megachat.stages.config import FROM_SFT, PairLoss, RewardSection
from megachat.stages.context import RunContext, stage_fingerprint
from megachat.stages.data_rows import prepare_rows
from megachat.stages.finite import at, require_figures
from megachat.stages.loop import (
    export,
    held_out_batches,
    plan_steps,
    warn_of_long_warmup,
)
from megachat.stages.results import StageResult
from megachat.stages.roles import load_model, start_model
from megachat.stages.scope import StageScope
from megachat.stages.skipped import SkippedUpdates
from megachat.telemetry.progress import StageProgress
from megachat.training.engine import ForwardEngine, TrainEngine


def run_reward(context: RunContext, progress_title: str, scope: StageScope) -> StageResult:
    """Trains the reward model and exports it as a HuggingFace folder."""
    started = time.monotonic()
    config, role = context.config.reward, context.config.models.reward
    data = prepare_rows(context, Stage.REWARD)
    loader = PreferenceLoader(
        data.train,
        LoaderOptions(
            batch_size=config.batch_pairs,
            seed=context.config.run.seed,
            bucket_window=config.bucket_window,
        ),
    )
    held_out = held_out_batches(PreferenceLoader, data.validation, count=config.evaluation_rows)
    model = _start(context)
    num_steps = plan_steps(Stage.REWARD, config, steps_per_epoch=len(loader))
    warn_of_long_warmup(Stage.REWARD, {"optimizer": config.optimizer}, num_updates=num_steps)
    engine = scope.own(
        TrainEngine(
            model,
            micro_batch_rows=role.micro_batch_rows,
            optimizer=config.optimizer,
            total_steps=num_steps,
            seed=seed_for(context.config.run.seed, Stage.REWARD),
        )
    )
    skipped = SkippedUpdates(context, Stage.REWARD, {"reward": engine})
    with (
        context.open_metrics(Stage.REWARD) as metrics,
        StageProgress(progress_title, total=num_steps) as progress,
    ):
        for step, batch in zip(range(num_steps), endless(loader), strict=False):
            with at(f"{Stage.REWARD} step {step}"):
                report = engine.forward_backward(batch, _objective(config, batch))
                require_number(report.loss, what="loss of the reward model")
            update = engine.step()
            values = {f"reward/{name}": value for name, value in report.metrics.items()}
            values |= {
                "reward/loss": report.loss,
                "reward/gradient_norm": update.gradient_norm,
                "reward/learning_rate": update.learning_rate,
                "reward/skipped_steps": skipped.total,
            }
            metrics.write(step, values)
            skipped.check(step)
            progress.advance(values)
        skipped.conclude()
        with at(f"{Stage.REWARD} after training"):
            figures = pair_metrics(engine, held_out, config)
            require_figures(figures, of="the reward model on held-out pairs")
            export(context, Stage.REWARD, model, role="reward model")
        metrics.write(num_steps, {f"reward/held_out_{name}": v for name, v in figures.items()})
    return StageResult(
        fingerprint=stage_fingerprint(context.config, Stage.REWARD),
        seconds=time.monotonic() - started,
        ended_by=config.step_limit(len(loader)),
        metrics={**figures, "steps": num_steps, "skipped_steps": skipped.total},
    )


def pair_metrics(
    engine: ForwardEngine, batches: Iterable[PreferenceBatch], config: RewardSection
) -> dict[str, float]:
    """Loss, accuracy, margin and scores over all pairs of the batches."""
    totals: dict[str, float] = {}
    pairs = 0
    for batch in batches:
        report = engine.evaluate(batch, _objective(config, batch))
        for name, value in {"loss": report.loss, **report.metrics}.items():
            totals[name] = totals.get(name, 0.0) + value * batch.num_rows
        pairs += batch.num_rows
    return {name: total / pairs for name, total in totals.items()}


def _start(context: RunContext) -> OptModel:
    """The reward model before training."""
    config, role = context.config.reward, context.config.models.reward
    options = role.options(dropout=config.dropout, attention_dropout=config.attention_dropout)
    if role.model == FROM_SFT:
        folder = context.source_folder(Stage.SFT)
        return load_model(
            context,
            role,
            folder,
            head=Head.SCALAR,
            options=options,
            missing_head=MissingHead.INITIALISE,
        )
    return start_model(context, role, head=Head.SCALAR, options=options)


def _objective(config: RewardSection, batch: PreferenceBatch) -> PairwiseObjective:
    kind = {
        PairLoss.BRADLEY_TERRY: PairwiseObjective,
        PairLoss.TOKEN_WISE: TokenwisePairwiseObjective,
    }[config.loss]
    return kind.for_batch(batch, center_coef=config.center_coef)
