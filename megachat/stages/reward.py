"""Step 2, the reward model: which of two answers a person prefers."""

import time
from collections.abc import Iterable

from megachat.checkpoint.huggingface import MissingHead, save_huggingface
from megachat.data.config import Stage
from megachat.data.loaders import LoaderOptions, PreferenceLoader, endless
from megachat.data.stage_data import build_stage_data
from megachat.model.config import Head
from megachat.model.opt import OptModel
from megachat.parallel.handover import store_barrier
from megachat.parallel.rng import seed_for
from megachat.records import PreferenceBatch
from megachat.rlhf.objectives import PairwiseObjective, TokenwisePairwiseObjective
from megachat.stages.config import FROM_SFT, PairLoss, RewardSection
from megachat.stages.context import RunContext, stage_fingerprint
from megachat.stages.loop import export_files, held_out_batches
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
    data = build_stage_data(context.config.data, stage=Stage.REWARD, tokenizer=context.tokenizer)
    store_barrier("preparing the data")
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
    num_steps = config.num_steps(len(loader))
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
            report = engine.forward_backward(batch, _objective(config, batch))
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
        figures = pair_metrics(engine, held_out, config)
        metrics.write(num_steps, {f"reward/held_out_{name}": v for name, v in figures.items()})
    save_huggingface(
        model, context.model_folder(Stage.REWARD), extra_files=export_files(context.config)
    )
    return StageResult(
        fingerprint=stage_fingerprint(context.config, Stage.REWARD),
        seconds=time.monotonic() - started,
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
