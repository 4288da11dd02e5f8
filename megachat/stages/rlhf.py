"""Step 3, PPO: the actor learns to say what the reward model likes, close to the reference."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean

from megachat.api import EngineSettings, RoleSettings, create_engine
from megachat.data.config import Stage
from megachat.data.loaders import LoaderOptions, PromptLoader, endless
from megachat.parallel.layout import ParallelLayout
from megachat.parallel.rng import seed_for
from megachat.records import PromptBatch
from megachat.rlhf.engine import RLHFEngine
from megachat.rlhf.ppo import PPOTrainer
from megachat.stages.context import RunContext, stage_fingerprint
from megachat.stages.data_rows import prepare_rows
from megachat.stages.evaluation import (
    PolicyEvaluation,
    compare,
    create_judge,
    evaluate_policy,
)
from megachat.stages.finite import at, require_figures
from megachat.stages.loop import (
    export,
    held_out_batches,
    plan_steps,
    warn_of_long_warmup,
)
from megachat.stages.results import Reply, ReshardCost, StageResult, write_json
from megachat.stages.scope import StageScope
from megachat.stages.skipped import SkippedUpdates
from megachat.telemetry.metrics import MetricsSink
from megachat.telemetry.progress import StageProgress
from megachat.telemetry.timers import PhaseTimers


def run_rlhf(context: RunContext, progress_title: str, scope: StageScope) -> StageResult:
    """Trains the actor with PPO, compares it with its start and exports it."""
    started = time.monotonic()
    config = context.config.rlhf
    judge = create_judge(config.judge)
    data = prepare_rows(context, Stage.PROMPTS)
    loader = PromptLoader(
        data.train, LoaderOptions(batch_size=config.batch_prompts, seed=context.config.run.seed)
    )
    held_out = held_out_batches(PromptLoader, data.validation, count=config.evaluation_rows)
    num_steps = plan_steps(Stage.PROMPTS, config, steps_per_epoch=len(loader))
    timers = context.timers()
    trainer = _build_trainer(context, scope, timers, num_steps=num_steps)
    skipped = SkippedUpdates(
        context,
        Stage.PROMPTS,
        {"actor": trainer.engine.actor.training, "critic": trainer.engine.critic},
    )

    def evaluate() -> PolicyEvaluation:
        return evaluate_policy(
            trainer,
            held_out,
            tokenizer=context.tokenizer,
            judge=judge,
            seed=context.config.run.seed,
        )

    with (
        context.open_metrics(Stage.PROMPTS) as metrics,
        StageProgress(
            progress_title, total=num_steps, show=("rlhf/score", "rlhf/kl", "ppo/clip_fraction")
        ) as progress,
    ):
        with at(f"{Stage.PROMPTS} before training"):
            with timers.phase("evaluate"):
                before = evaluate()
            with timers.phase("calibrate"):
                trainer.calibrate(loader)
        steps = []
        for step, prompts in zip(range(num_steps), endless(loader), strict=False):
            with at(f"{Stage.PROMPTS} step {step}"):
                values = ppo_step(trainer, prompts, step=step, metrics=metrics, skipped=skipped)
            steps.append(values)
            skipped.check(step)
            progress.advance(values)
        skipped.conclude()
    with at(f"{Stage.PROMPTS} after training"):
        with timers.phase("evaluate"):
            after = evaluate()
        figures = compare(before, after, judge=judge, seed=context.config.run.seed)
        require_figures(figures, of="the actor on held-out prompts")
        with timers.phase("save"):
            export(context, Stage.PROMPTS, trainer.engine.actor.training.model, role="actor")
    if context.worker.rank == 0:
        folder = context.folder(Stage.PROMPTS)
        write_json(folder / "held_out.json", {"before": asdict(before), "after": asdict(after)})
    return StageResult(
        fingerprint=stage_fingerprint(context.config, Stage.PROMPTS),
        seconds=time.monotonic() - started,
        ended_by=config.step_limit(len(loader)),
        metrics={
            **figures,
            "steps": num_steps,
            "skipped_steps": skipped.total,
            "rollout_logprob_gap": max(step["rlhf/rollout_logprob_gap"] for step in steps),
        },
        phase_seconds=timers.self_totals(),
        reshard=_reshard_cost(context, steps),
        replies=_replies(before, after, count=config.samples),
    )


def _build_trainer(
    context: RunContext, scope: StageScope, timers: PhaseTimers, *, num_steps: int
) -> PPOTrainer:
    """PPO over the four roles, which end with the stage."""
    config = context.config.rlhf
    num_updates = num_steps * config.ppo.epochs * config.ppo.minibatches
    warn_of_long_warmup(
        Stage.PROMPTS,
        {"actor_optimizer": config.actor_optimizer, "critic_optimizer": config.critic_optimizer},
        num_updates=num_updates,
    )
    return PPOTrainer(
        scope.own(build_engine(context, num_updates=num_updates)),
        config=config.ppo,
        sampling=config.sampling,
        seed=seed_for(context.config.run.seed, Stage.PROMPTS),
        timers=timers,
        old_logprobs=config.old_logprobs,
        tolerance=config.logprob_tolerance,
    )


def ppo_step(
    trainer: PPOTrainer,
    prompts: PromptBatch,
    *,
    step: int,
    metrics: MetricsSink,
    skipped: SkippedUpdates | None = None,
) -> dict[str, float]:
    """One generation phase and the updates on it; returns what was written.

    Updates end early where the policy has moved too far, or where `skipped` has seen enough.
    """
    started = time.monotonic()
    experience = trainer.generate_experience(prompts)
    values = dict(trainer.experience_metrics)
    for minibatch in trainer.minibatches(experience):
        report = trainer.train_rlhf(minibatch)
        values |= report.metrics
        is_stuck = skipped is not None and skipped.note(step)
        if is_stuck or trainer.should_stop(report):
            break
    seconds = time.monotonic() - started
    values["perf/step_seconds"] = seconds
    values["perf/response_tokens_per_second"] = float(experience.response_mask.sum()) / seconds
    metrics.write(step, values)
    return values


def build_engine(context: RunContext, *, num_updates: int) -> RLHFEngine:
    """The four roles, from the outputs of the first two stages."""
    config, models = context.config.rlhf, context.config.models
    return create_engine(
        context.worker,
        actor=RoleSettings(
            model=context.source_folder(Stage.SFT),
            tensor=models.actor.tensor,
            pipeline=models.actor.pipeline,
            options=models.actor.options(),
            micro_batch_rows=models.actor.micro_batch_rows,
            optimizer=config.actor_optimizer,
        ),
        reward=RoleSettings(
            model=context.source_folder(Stage.REWARD),
            tensor=models.reward.tensor,
            pipeline=models.reward.pipeline,
            options=models.reward.options(),
            micro_batch_rows=models.reward.micro_batch_rows,
            optimizer=config.critic_optimizer,
        ),
        tokenizer=context.tokenizer,
        total_steps=num_updates,
        settings=EngineSettings(
            generation_tensor=config.generation_degree(models.actor),
            generation=config.generation,
            measures=config.memory,
            logprob_backend=models.actor.logprob_backend,
            ranks_per_node=context.config.launch.processes,
            seed=seed_for(context.config.run.seed, Stage.PROMPTS),
        ),
    )


def _reshard_cost(context: RunContext, steps: Sequence[Mapping[str, float]]) -> ReshardCost:
    """What a phase change of the actor took on average over the steps."""
    actor, world_size = context.config.models.actor, context.worker.world_size
    degree = context.config.rlhf.generation_degree(actor)

    def mean(name: str) -> float:
        return fmean(values[f"perf/reshard_{name}"] for values in steps)

    return ReshardCost(
        train=str(actor.layout(world_size)),
        generate=str(ParallelLayout.for_world(world_size, tensor=degree)),
        count=len(steps),
        seconds=mean("seconds"),
        received_bytes=mean("received_bytes"),
        redundant_bytes=mean("redundant_bytes"),
    )


def _replies(before: PolicyEvaluation, after: PolicyEvaluation, *, count: int) -> list[Reply]:
    """The first held-out prompts with both replies."""
    rows = zip(before.prompts, before.replies, after.replies, strict=True)
    return [
        Reply(prompt=prompt, before=first, after=second)
        for _, (prompt, first, second) in zip(range(count), rows, strict=False)
    ]
