"""One test per known flaw of DeepSpeed-Chat (commit 83757d9c) that concerns `megachat.rlhf`.

Where the flaw has a number, the flawed computation is repeated here to show the difference.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from megachat.records import Batch, Experience, PreferenceBatch
from megachat.rlhf.advantages import explained_variance, generalized_advantages, whiten
from megachat.rlhf.config import (
    KlControl,
    MissingEos,
    PpoConfig,
    RewardConfig,
    RewardNormalization,
    Whitening,
)
from megachat.rlhf.kl import create_kl_controller
from megachat.rlhf.losses import POLICY_MAXIMA, POLICY_METRICS
from megachat.rlhf.objectives import (
    PairwiseObjective,
    PolicyObjective,
    TokenwisePairwiseObjective,
    ValueObjective,
)
from megachat.rlhf.rewards import RewardNormalizer, shape_rewards
from megachat.training.loss import LossFunction, LossTerms
from tests.rlhf import outputs

PAD, EOS = 1, 2
CONFIG = PpoConfig()


def _experience(responses: list[list[int]], *, prompt: tuple[int, ...] = (2, 5)) -> Experience:
    """Responses to one prompt, all statistics zero."""
    width = max(map(len, responses))
    rows = [[*prompt, *response] for response in responses]
    rows = [row + [PAD] * (len(prompt) + width - len(row)) for row in rows]
    lengths = torch.tensor([len(response) for response in responses])
    zeros = torch.zeros(len(responses), width)
    return Experience(
        tokens=torch.tensor(rows),
        lengths=lengths + len(prompt),
        prompt_lengths=torch.full_like(lengths, len(prompt)),
        response_mask=torch.arange(width)[None] < lengths[:, None],
        logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        advantages=zeros,
        returns=zeros,
        scores=torch.zeros(len(responses)),
        finished=torch.tensor([response[-1:] == [EOS] for response in responses]),
    )


def _terms(
    objective: LossFunction, values: Tensor, batch: Batch, weights: Tensor | None = None
) -> LossTerms:
    """An objective on the part of a dense output that it reads; every row counts by default."""
    weights = torch.ones(batch.num_rows) if weights is None else weights
    return objective(outputs.asked_for(objective, values, batch), batch, weights)


def _gae(reward: Tensor, values: Tensor) -> Tensor:
    return generalized_advantages(
        rewards=reward,
        values=values,
        response_mask=torch.ones_like(reward).bool(),
        gamma=1.0,
        lam=0.95,
    ).advantages


def test_f1_log_probs_are_those_of_the_distribution_that_was_sampled_from() -> None:
    """The ratio of the sampling policy to itself is 1 at its temperature, and only there."""
    experience = _experience([[6, 7, EOS]])
    logits = torch.randn(1, 5, 9, generator=torch.Generator().manual_seed(0))
    sampled = outputs.sampled_logprobs(logits, experience, temperature=0.7)
    experience = dataclasses.replace(experience, logprobs=sampled)

    def approx_kl(temperature: float) -> float:
        objective = PolicyObjective.for_batch(experience, CONFIG, temperature=temperature)
        return _terms(objective, logits, experience).metrics["approx_kl"].item()

    assert approx_kl(0.7) == pytest.approx(0.0, abs=1e-7)
    assert approx_kl(1.0) > 0.01


def test_f2_no_mask_is_inferred_from_a_token_id() -> None:
    """Pad, BOS and EOS ids in a row are tokens like any other; lengths alone say what is real."""
    experience = dataclasses.replace(
        _experience([[EOS, PAD, EOS, 6]]),
        advantages=torch.ones(1, 4),
        returns=torch.ones(1, 4),
    )
    logits = torch.zeros(1, 6, 9, requires_grad=True)
    objective = PolicyObjective.for_batch(experience, CONFIG, temperature=1.0)
    _terms(objective, logits, experience).loss.backward()
    assert logits.grad.abs().sum(dim=2)[0].gt(0).tolist() == [False] + [True] * 4 + [False]
    values = torch.zeros(1, 6, requires_grad=True)
    critic = ValueObjective.for_batch(experience, CONFIG)
    _terms(critic, values, experience).loss.backward()
    assert values.grad[0].ne(0).tolist() == [False] + [True] * 4 + [False]


def test_f3_eos_step_is_inside_the_mask_and_gets_gradient() -> None:
    response = [6, 7, 8, 6, 7, EOS]
    experience = dataclasses.replace(
        _experience([response]), advantages=torch.ones(1, 6), returns=torch.ones(1, 6)
    )
    assert experience.response_mask.sum() == 6
    predicts_eos = 2 + len(response) - 2  # position of the state in which EOS is chosen
    logits = torch.zeros(1, 8, 9, requires_grad=True)
    objective = PolicyObjective.for_batch(experience, CONFIG, temperature=1.0)
    _terms(objective, logits, experience).loss.backward()
    assert logits.grad[0, predicts_eos, EOS] < 0  # a good response makes stopping likelier
    values = torch.zeros(1, 8, requires_grad=True)
    critic = ValueObjective.for_batch(experience, CONFIG)
    _terms(critic, values, experience).loss.backward()
    assert values.grad[0, predicts_eos] != 0


def test_f3_the_numbers_of_the_flaw_and_why_they_do_no_harm_here() -> None:
    """Six nonzero advantages, five of them unmasked; an untrained V(EOS) shifts every one."""
    reward = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    values = torch.zeros(1, 6)
    flawed_mask = torch.tensor([[True] * 5 + [False]])
    assert _gae(reward, values).count_nonzero() == 6
    assert flawed_mask.sum() == 5
    raised = values.clone()
    raised[0, 5] += 1.0
    shift = (_gae(reward, raised) - _gae(reward, values))[flawed_mask]
    expected = torch.tensor([0.95**4 * 0.05, 0.95**3 * 0.05, 0.95**2 * 0.05, 0.0475, 0.050])
    torch.testing.assert_close(shift, expected)
    # With the EOS step inside the mask its value is trained towards its return, and at that value
    # the leak is that of any state: the advantage of the last step is zero.
    trained = values.clone()
    trained[0, 5] = 1.0
    assert _gae(reward, trained)[0, 5] == 0.0


def _chosen_gradient(loss: Tensor, values: Tensor) -> Tensor:
    loss.backward()
    return values.grad[0, 0].abs()


def _flawed_pair_loss(values: Tensor, *, start: int, end: int) -> Tensor:
    """Mean over all positions from the first difference to the longer end, pads included."""
    margin = values[0, 0, start:end] - values[0, 1, start:end]
    return -torch.nn.functional.logsigmoid(margin).mean()


def _short_and_long_answer() -> PreferenceBatch:
    """A prompt of 3 tokens, answered with 6 and with 25 tokens that differ from the first on."""
    chosen, rejected = [2, 5, 6] + [7] * 5 + [EOS], [2, 5, 6] + [8] * 24 + [EOS]
    rows = [row + [PAD] * (28 - len(row)) for row in (chosen, rejected)]
    return PreferenceBatch(
        tokens=torch.tensor([rows]),
        lengths=torch.tensor([[9, 28]]),
        prompt_lengths=torch.tensor([3]),
    )


def _flawed_shares(values: Tensor) -> tuple[float, float]:
    """Shares of the chosen row's gradient that pads and the last real token get in the flaw."""
    flawed = _chosen_gradient(_flawed_pair_loss(values, start=3, end=28), values)
    assert (flawed.count_nonzero(), flawed[9:].count_nonzero()) == (25, 19)
    return (flawed[9:].sum() / flawed.sum()).item(), (flawed[8] / flawed.sum()).item()


def test_f4_the_numbers_of_the_flaw() -> None:
    """19 of 25 positions are pads; 81 % and 4.5 % were measured on one draw of scores."""
    equal = _flawed_shares(torch.zeros(1, 2, 28, requires_grad=True))
    assert equal == pytest.approx((19 / 25, 1 / 25))
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor(
        [
            _flawed_shares(torch.randn(1, 2, 28, generator=generator).requires_grad_())
            for _ in range(200)
        ]
    )
    low, high = draws.quantile(0.05, dim=0), draws.quantile(0.95, dim=0)
    assert low[0] < 0.81 < high[0] and low[1] < 0.045 < high[1]


def test_f4_no_pad_has_a_gradient_and_the_final_scores_have_all_of_it() -> None:
    batch = _short_and_long_answer()
    values = torch.randn(2, 28, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _terms(PairwiseObjective.for_batch(batch), values, batch).loss.backward()
    assert values.grad[0].nonzero().flatten().tolist() == [8]
    assert values.grad[1].nonzero().flatten().tolist() == [27]


def test_f4_the_tokenwise_option_leaves_pads_out_and_trains_both_final_scores() -> None:
    batch = _short_and_long_answer()
    values = torch.zeros(2, 28, requires_grad=True)
    terms = _terms(TokenwisePairwiseObjective.for_batch(batch), values, batch)
    terms.loss.backward()
    share = values.grad.abs() / values.grad.abs().sum(dim=1, keepdim=True)
    assert not share[0, 9:].any() and not share[:, :3].any()
    # 19 positions of the longer answer are compared with the shorter one's final score, plus its
    # own: 20 of 25 shares stand where the flawed loss has one, and 19 on pads.
    assert share[0, 8].item() == pytest.approx(20 / 25)
    assert share[1, 27].item() == pytest.approx(1 / 25)


def test_f5_the_reward_stands_on_the_stop_token_that_generation_and_training_share() -> None:
    """The score is read and paid at the last token of a row, which the record says, not a text."""
    experience = _experience([[6, EOS], [6, 7, 8]])
    shaped = shape_rewards(
        scores=torch.tensor([2.0, 2.0]),
        kl=torch.zeros(2, 3),
        response_mask=experience.response_mask,
        finished=experience.finished,
        kl_coefficient=0.1,
        config=RewardConfig(missing_eos=MissingEos.PENALIZE, missing_eos_value=-1.0),
    )
    assert shaped.tolist() == [[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]


def test_f6_whitening_normalisation_adaptive_kl_and_the_statistics_are_on_by_default() -> None:
    assert CONFIG.whitening is Whitening.FULL
    assert CONFIG.reward.normalization is RewardNormalization.REFERENCE
    assert CONFIG.kl.control is KlControl.ADAPTIVE
    names = {*POLICY_METRICS, *POLICY_MAXIMA}
    assert {"clip_fraction", "approx_kl", "ratio_mean", "ratio_max", "entropy"} <= names
    controller = create_kl_controller(CONFIG.kl)
    controller.update(10 * CONFIG.kl.target, num_samples=512)
    assert controller.coefficient > CONFIG.kl.coefficient
    normalizer = RewardNormalizer(CONFIG.reward.normalization)
    normalizer.calibrate(torch.randn(512) * 7 + 40)
    assert normalizer.standardize(torch.tensor([40.0])).abs().item() < 0.2
    values, mask = torch.randn(4, 6), torch.ones(4, 6).bool()
    assert whiten(values, mask=mask, whitening=CONFIG.whitening).var().item() < 1.1
    assert explained_variance(values, returns=values, mask=mask).item() == 1.0


def test_f6_training_may_stop_early_on_the_kl_of_the_updated_policy() -> None:
    """The k3 estimate that the early stop watches grows with the distance of the policy."""
    experience = _experience([[6, 7, EOS]])
    objective = PolicyObjective.for_batch(experience, CONFIG, temperature=1.0)
    logits = torch.randn(1, 5, 9, generator=torch.Generator().manual_seed(0))
    sampled = outputs.sampled_logprobs(logits, experience, temperature=1.0)
    experience = dataclasses.replace(experience, logprobs=sampled)
    distances = [
        _terms(objective, logits * (1 + step), experience).metrics["approx_kl"].item()
        for step in (0.0, 0.1, 0.2, 0.4)
    ]
    assert distances == sorted(distances) and distances[-1] > distances[0]


def test_f7_the_first_pass_over_an_experience_has_ratio_exactly_one() -> None:
    """Old and new log-probs come from one function, so equal logits give equal bits."""
    experience = _experience([[6, 7, EOS], [8, EOS]])
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    sampled = outputs.sampled_logprobs(logits, experience, temperature=0.9)
    experience = dataclasses.replace(experience, logprobs=sampled)
    objective = PolicyObjective.for_batch(experience, CONFIG, temperature=0.9)
    terms = _terms(objective, logits, experience)
    assert terms.maxima["ratio_max"].item() == 1.0
    assert terms.metrics["approx_kl"].item() == 0.0


def test_f10_empty_responses_and_fillers_are_masked_instead_of_dropped() -> None:
    """Rows without tokens stay in the batch, so every rank has the same number of them."""
    experience = dataclasses.replace(
        _experience([[6, 7, EOS], []]), advantages=torch.ones(2, 3), returns=torch.ones(2, 3)
    )
    alone = experience.select(torch.tensor([0]))
    filled = experience.select(torch.tensor([0, 1, 0, 0]))
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0])
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(2))
    objective = PolicyObjective.for_batch(experience, CONFIG, temperature=1.0)
    expected = _terms(objective, table[alone.tokens], alone)
    found = _terms(objective, table[filled.tokens], filled, weights)
    torch.testing.assert_close(found.loss, expected.loss)
    for name in POLICY_METRICS:
        torch.testing.assert_close(found.metrics[name], expected.metrics[name])


def test_f12_rewards_and_advantages_loop_over_time_only() -> None:
    """Cost in tensor operations does not grow with the number of rows."""

    def operations(num_rows: int) -> int:
        with torch.profiler.profile() as profile:
            mask = torch.ones(num_rows, 5).bool()
            zeros = torch.zeros(num_rows, 5)
            shaped = shape_rewards(
                scores=zeros[:, 0],
                kl=zeros,
                response_mask=mask,
                finished=mask[:, 0],
                kl_coefficient=0.1,
                config=CONFIG.reward,
            )
            generalized_advantages(
                rewards=shaped, values=zeros, response_mask=mask, gamma=1.0, lam=0.95
            )
        return len(profile.events())

    operations(2)  # first-use events
    assert operations(2) == operations(64)


def _flawed_policy_loss(per_token: Tensor, mask: Tensor, cuts: list[list[int]]) -> float:
    """Mean over micro-batches of the mean over each one's own tokens."""
    means = [(per_token[cut] * mask[cut]).sum() / mask[cut].sum() for cut in cuts]
    return (sum(means) / len(cuts)).item()


def test_f13_a_token_weighs_the_same_however_the_batch_is_cut() -> None:
    experience = _experience([[6, EOS], [6, 7, 8, 7, 6, 7, 8, EOS], [EOS], [7, 8, 6, 7, 8, EOS]])
    generator = torch.Generator().manual_seed(3)
    gains = torch.randn(4, 8, generator=generator) * experience.response_mask
    experience = dataclasses.replace(experience, advantages=gains)
    table = torch.randn(9, 9, generator=generator)
    objective = PolicyObjective.for_batch(experience, CONFIG, temperature=1.0)

    def ours(cuts: list[list[int]]) -> float:
        parts = [experience.select(torch.tensor(cut)) for cut in cuts]
        terms = [_terms(objective, table[part.tokens], part) for part in parts]
        return sum(term.loss.item() for term in terms)

    whole, halves, others = [[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    flawed = [
        _flawed_policy_loss(-gains, experience.response_mask, cuts)
        for cuts in (whole, halves, others)
    ]
    assert max(flawed) - min(flawed) > 0.01
    assert ours(halves) == pytest.approx(ours(whole), abs=1e-6)
    assert ours(others) == pytest.approx(ours(whole), abs=1e-6)
