"""The four trainings that megachat does, tiny: data, our objectives, and an independent oracle.

The oracle is HuggingFace's model in float64 on one process, whole batches without micro-batches,
the losses written out row by row, and `torch.optim.AdamW` with `clip_grad_norm_`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megachat.model import Head, OptConfig
from megachat.parallel.layout import ParallelLayout
from megachat.records import Batch, Experience, PreferenceBatch, SftBatch
from megachat.rlhf.config import PpoConfig
from megachat.rlhf.objectives import (
    PairwiseObjective,
    PolicyObjective,
    SftObjective,
    ValueObjective,
)
from megachat.training.engine import ForwardEngine, TrainEngine
from megachat.training.loss import LossFunction
from megachat.training.schedules import OptimizerConfig, ScheduleKind
from tests.model import reference as ref

ROWS, SEQ, RESPONSE = 5, 14, 6
"""Five ragged rows: no number of ranks and no micro-batch size of the tests divides them."""
STEPS = 20
MICRO_BATCH_ROWS = 2
TEMPERATURE = 0.7
CENTER_COEF = 0.01
PPO = PpoConfig(entropy_coef=0.02, dual_clip=1.5, clip_range=0.2, value_clip_range=0.2)
OPTIMIZER = OptimizerConfig(
    learning_rate=0.005,
    schedule=ScheduleKind.LINEAR,
    warmup_steps=3,
    final_share=0.1,
    epsilon=1e-3,
    weight_decay=0.1,
    clip_norm=1.0,
)
"""The large epsilon keeps Adam from turning a gradient of 1e-9 into a full step of either sign."""

VOCAB = 150
"""More than one rank's 128 aligned rows, so that both ranks of two hold real vocabulary."""
PRE_LN = OptConfig(
    vocab_size=VOCAB, max_positions=20, hidden=32, ffn=48, layers=2, heads=4, embed_dim=32
)
POST_LN = OptConfig(
    vocab_size=VOCAB,
    max_positions=20,
    hidden=32,
    ffn=48,
    layers=2,
    heads=4,
    embed_dim=16,
    layer_norm_first=False,
)


@dataclass(frozen=True)
class Task:
    """One kind of training."""

    config: OptConfig
    head: Head
    make_batch: Callable[[int, int], Batch]
    """(rows, seed) -> a global batch."""
    objective: Callable[[ForwardEngine, Any], LossFunction[Any]]
    """Ours, for a global batch on an engine."""
    expected_loss: Callable[[nn.Module, Any], Tensor]
    """The oracle's loss of a global batch."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padded(tokens: Tensor, lengths: Tensor, *, pad: int = 1) -> Tensor:
    """`tokens` `[..., seq]` with `pad` from each row's length on."""
    return tokens.masked_fill(torch.arange(tokens.shape[-1]) >= lengths[..., None], pad)


def sft_batch(rows: int, seed: int) -> SftBatch:
    random = generator(seed)
    lengths = torch.randint(3, SEQ + 1, (rows,), generator=random)
    targets = torch.rand(rows, SEQ, generator=random) < 0.7
    return SftBatch(
        tokens=padded(torch.randint(4, VOCAB, (rows, SEQ), generator=random), lengths),
        lengths=lengths,
        loss_mask=targets & (torch.arange(SEQ) < lengths[:, None]),
    )


def preference_batch(rows: int, seed: int) -> PreferenceBatch:
    random = generator(seed)
    lengths = torch.randint(4, SEQ + 1, (rows, 2), generator=random)
    tokens = torch.randint(4, VOCAB, (rows, 2, SEQ), generator=random)
    tokens[:, 1, :3] = tokens[:, 0, :3]
    return PreferenceBatch(
        tokens=padded(tokens, lengths), lengths=lengths, prompt_lengths=torch.full((rows,), 3)
    )


def experience(rows: int, seed: int) -> Experience:
    """Old log-probs and values near a fresh model's, so that some tokens are clipped."""
    random = generator(seed)
    prompts = torch.randint(1, SEQ - RESPONSE + 1, (rows,), generator=random)
    responses = torch.randint(0, RESPONSE + 1, (rows,), generator=random)
    responses[0] = RESPONSE
    mask = torch.arange(RESPONSE) < responses[:, None]
    noise = torch.randn(5, rows, RESPONSE, generator=random) * mask
    return Experience(
        tokens=padded(torch.randint(4, VOCAB, (rows, SEQ), generator=random), prompts + responses),
        lengths=prompts + responses,
        prompt_lengths=prompts,
        response_mask=mask,
        logprobs=(-5.0 + 0.4 * noise[0]) * mask,
        ref_logprobs=-5.0 * mask,
        values=0.3 * noise[1],
        advantages=noise[2],
        returns=noise[3],
        scores=torch.zeros(rows),
        finished=torch.ones(rows, dtype=torch.bool),
    )


def expected_sft_loss(model: nn.Module, batch: SftBatch) -> Tensor:
    terms = []
    for tokens, length, mask in zip(batch.tokens, batch.lengths, batch.loss_mask, strict=True):
        logits = model(input_ids=tokens[None, :length]).logits[0]
        losses = functional.cross_entropy(logits[:-1], tokens[1:length], reduction="none")
        terms.append(losses[mask[1:length]])
    return torch.cat(terms).mean()


def expected_pair_loss(model: nn.Module, batch: PreferenceBatch) -> Tensor:
    scores = torch.stack(
        [
            scalars(model, tokens[:length])[-1]
            for tokens, length in zip(
                batch.tokens.flatten(0, 1), batch.lengths.flatten(), strict=True
            )
        ]
    ).view(-1, 2)
    likelihood = torch.sigmoid(scores[:, 0] - scores[:, 1]).log().mean()
    return CENTER_COEF * scores.square().sum(1).mean() / 2 - likelihood


def expected_policy_loss(model: nn.Module, batch: Experience) -> Tensor:
    terms = []
    for row in range(batch.num_rows):
        prompt, length = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        answer = batch.tokens[row, prompt:length]
        logits = model(input_ids=batch.tokens[row : row + 1, :length]).logits[0, prompt - 1 : -1]
        distribution = torch.distributions.Categorical(
            logits=logits / TEMPERATURE,
            validate_args=False,  # which refuses the rows without an answer
        )
        ratio = (distribution.log_prob(answer) - batch.logprobs[row, : len(answer)]).exp()
        gain = batch.advantages[row, : len(answer)].double()
        loss = -torch.minimum(gain * ratio, gain * ratio.clip(0.8, 1.2))
        loss = torch.where(gain < 0, loss.minimum(-1.5 * gain), loss)
        terms.append(loss - 0.02 * distribution.entropy())
    return torch.cat(terms).mean()


def expected_value_loss(model: nn.Module, batch: Experience) -> Tensor:
    terms = []
    for row in range(batch.num_rows):
        prompt, length = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        values = scalars(model, batch.tokens[row, :length])[prompt - 1 : length - 1]
        old, goal = (part[row, : length - prompt] for part in (batch.values, batch.returns))
        near = old + (values - old).clip(-0.2, 0.2)
        terms.append(torch.maximum((values - goal) ** 2, (near - goal) ** 2) / 2)
    return torch.cat(terms).mean()


def scalars(model: nn.Module, tokens: Tensor) -> Tensor:
    """`[seq]` outputs of the scalar head for one row without padding."""
    hidden = model.model(input_ids=tokens[None]).last_hidden_state
    return model.score(hidden)[0, :, 0]


def sft_objective(engine: ForwardEngine, batch: SftBatch) -> SftObjective:
    return SftObjective.for_batch(batch, group=engine.groups.tensor, vocab_start=engine.vocab_start)


def pair_objective(_: ForwardEngine, batch: PreferenceBatch) -> PairwiseObjective:
    return PairwiseObjective.for_batch(batch, center_coef=CENTER_COEF)


def policy_objective(engine: ForwardEngine, batch: Experience) -> PolicyObjective:
    return PolicyObjective.for_batch(
        batch,
        PPO,
        temperature=TEMPERATURE,
        group=engine.groups.tensor,
        vocab_start=engine.vocab_start,
    )


def value_objective(_: ForwardEngine, batch: Experience) -> ValueObjective:
    return ValueObjective.for_batch(batch, PPO)


TASKS = {
    "sft": Task(PRE_LN, Head.LANGUAGE_MODEL, sft_batch, sft_objective, expected_sft_loss),
    "reward": Task(POST_LN, Head.SCALAR, preference_batch, pair_objective, expected_pair_loss),
    "policy": Task(
        POST_LN, Head.LANGUAGE_MODEL, experience, policy_objective, expected_policy_loss
    ),
    "value": Task(PRE_LN, Head.SCALAR, experience, value_objective, expected_value_loss),
}


@dataclass(frozen=True)
class Trajectory:
    """What a training did, step by step."""

    losses: Sequence[float]
    norms: Sequence[float]
    """Global gradient norm before clipping."""
    weight_error: float = 0.0
    """Largest difference of a final weight of this rank from the oracle's."""


def expected_trajectory(name: str, *, weights: Path | None = None) -> Trajectory:
    """Trains the oracle; leaves its final weights, by specification name, in a file."""
    task = TASKS[name]
    model = ref.huggingface_model(task.config, task.head).double()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
    )
    losses, norms = [], []
    for step in range(STEPS):
        warm, done = min(1.0, (step + 1) / 3), max(0, step - 3) / (STEPS - 3)
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * warm * (1.0 - 0.9 * done)
        loss = task.expected_loss(model, task.make_batch(ROWS, step))
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        losses.append(loss.item())
        optimizer.step()
    if weights is not None:
        torch.save(ref.by_spec_name(model.state_dict(), task.config), weights)
    return Trajectory(losses=losses, norms=norms)


def make_engine(
    name: str,
    layout: ParallelLayout,
    *,
    micro_batch_rows: int = MICRO_BATCH_ROWS,
    optimizer: OptimizerConfig = OPTIMIZER,
    **options: Any,
) -> TrainEngine:
    """A training engine that starts from the oracle's weights."""
    task = TASKS[name]
    model = ref.build_model(
        task.config,
        layout,
        head=task.head,
        reference=ref.huggingface_model(task.config, task.head),
        **options,
    )
    return TrainEngine(
        model, micro_batch_rows=micro_batch_rows, optimizer=optimizer, total_steps=STEPS, seed=7
    )


def train(
    engine: TrainEngine, name: str, *, steps: range = range(STEPS), weights: Path | None = None
) -> Trajectory:
    """Trains one of the tasks."""
    task = TASKS[name]
    losses, norms = [], []
    for step in steps:
        batch = task.make_batch(ROWS, step)
        losses.append(engine.forward_backward(batch, task.objective(engine, batch)).loss)
        norms.append(engine.step().gradient_norm)
    error = 0.0
    if weights is not None:
        error = weight_error(engine, torch.load(weights))
    return Trajectory(losses=losses, norms=norms, weight_error=error)


def weight_error(engine: TrainEngine, expected: dict[str, Tensor]) -> float:
    """Largest difference of this rank's weights from whole tensors by specification name."""
    specs = engine.model.local_specs()
    return max(
        (parameter - ref.own_part(engine.model, name, expected[specs[name].name]))
        .abs()
        .max()
        .item()
        for name, parameter in engine.model.named_parameters()
    )
