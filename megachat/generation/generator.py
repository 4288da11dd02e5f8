"""`Generator`: answers a global batch of prompts with the actor's present weights.

Each data-parallel rank answers its share; the result is the same global `Rollout` on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megachat.errors import CapacityError, DataError
from megachat.generation.runner import ModelRunner
from megachat.generation.sampling import Sampler, SamplingConfig, request_generators
from megachat.model.opt import OptModel
from megachat.parallel.collectives import all_gather_rows
from megachat.records import PromptBatch, Rollout

_COMPACT_BELOW = 0.75
"""Finished rows leave the batch once fewer than this share of it is still active."""


@dataclass(slots=True)
class _Responses:
    """Responses under construction, one row per request of this rank."""

    tokens: Tensor
    """[rows, max_new_tokens] int64."""
    logprobs: Tensor
    """[rows, max_new_tokens] float32."""
    lengths: Tensor
    """[rows] int64."""
    finished: Tensor
    """[rows] bool."""


class Generator:
    """Samples responses from an `OptModel` of pipeline degree 1."""

    def __init__(
        self, model: OptModel, *, stop_ids: Sequence[int], suppressed_ids: Sequence[int] = ()
    ) -> None:
        """Prepares generation; holds no copy of the weights.

        Args:
            model: The actor; a language model.
            stop_ids: Tokens that end a response and are part of it.
            suppressed_ids: Tokens that are never sampled.

        Raises:
            LayoutError: The model is cut into pipeline stages.
        """
        self._runner = ModelRunner(model)
        self._groups = model.groups
        self._config = model.config
        self._device = next(model.parameters()).device
        self._stop_ids = tuple(stop_ids)
        self._suppressed_ids = tuple(suppressed_ids)

    def generate(self, prompts: PromptBatch, *, sampling: SamplingConfig, seed: int) -> Rollout:
        """Answers every prompt.

        Args:
            prompts: The global batch, equal on every rank; each prompt has at least one token.
            sampling: How tokens are chosen.
            seed: Names the random streams together with each prompt's id.

        Returns:
            The global rollout on the CPU, rows in the order of the prompts.

        Raises:
            CapacityError: A prompt and its longest response exceed the model's positions.
            DataError: A prompt is empty or has ids outside the vocabulary.
        """
        self._check(prompts, sampling)
        layout, own = self._groups.layout, self._groups.coordinate.data
        # Dealt by length, so that every data rank gets its share of long prompts.
        order = prompts.lengths.argsort(stable=True, descending=True)
        share = -(-prompts.num_rows // layout.data)
        dealt = torch.nn.functional.pad(order, (0, share * layout.data - len(order)), value=-1)
        mine = dealt[own :: layout.data]
        local = prompts.select(mine[mine >= 0])
        responses = self._empty(share, sampling)
        if local.num_rows:
            self._answer(local, responses, sampling=sampling, seed=seed)
        rows = torch.cat([dealt[rank :: layout.data] for rank in range(layout.data)])
        return self._assemble(prompts, responses, rows)

    def _check(self, prompts: PromptBatch, sampling: SamplingConfig) -> None:
        """Refuses prompts that would index outside the model's tables, on every rank alike."""
        longest, positions = int(prompts.lengths.max()), self._config.max_positions
        if longest + sampling.max_new_tokens > positions:
            raise CapacityError(
                f"a prompt of {longest} tokens + max_new_tokens {sampling.max_new_tokens} = "
                f"{longest + sampling.max_new_tokens} positions, but the model has {positions}: "
                "shorten prompts or lower max_new_tokens"
            )
        if int(prompts.lengths.min()) < 1:
            row = int(prompts.lengths.argmin())
            raise DataError(f"prompt {int(prompts.ids[row])} is empty: give it at least one token")
        vocab = self._config.vocab_size
        low, high = int(prompts.tokens.min()), int(prompts.tokens.max())
        if low < 0 or high >= vocab:
            raise DataError(
                f"prompt token ids range from {low} to {high}, the model's vocabulary from 0 to "
                f"{vocab - 1}: use the tokenizer the model was trained with"
            )

    def _empty(self, rows: int, sampling: SamplingConfig) -> _Responses:
        size, device = (rows, sampling.max_new_tokens), self._device
        return _Responses(
            tokens=torch.zeros(size, dtype=torch.int64, device=device),
            logprobs=torch.zeros(size, device=device),
            lengths=torch.zeros(rows, dtype=torch.int64, device=device),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def _answer(
        self, prompts: PromptBatch, responses: _Responses, *, sampling: SamplingConfig, seed: int
    ) -> None:
        """Fills `responses` for this rank's prompts."""
        sampler = Sampler(sampling, stop_ids=self._stop_ids, suppressed_ids=self._suppressed_ids)
        generators = request_generators(prompts.ids.tolist(), seed=seed, device=self._device)
        stops = torch.tensor(self._stop_ids, dtype=torch.int64, device=self._device)
        prompt_len = int(prompts.lengths.max())
        state, logits = self._runner.prefill(
            prompts.tokens[:, :prompt_len].to(self._device),
            prompts.lengths.to(self._device),
            capacity=prompt_len + sampling.max_new_tokens,
        )
        rows = torch.arange(prompts.num_rows, device=self._device)  # request of each batch row
        active = torch.ones_like(rows, dtype=torch.bool)
        for position in range(sampling.max_new_tokens):
            sampled = sampler.sample(
                logits, generators=[generators[row] for row in rows.tolist()], position=position
            )
            live = rows[active]
            responses.tokens[live, position] = sampled.tokens[active]
            responses.logprobs[live, position] = sampled.logprobs[active]
            responses.lengths[live] += 1
            stopped = torch.isin(sampled.tokens, stops)
            responses.finished[rows[active & stopped]] = True
            active = active & ~stopped
            num_active = int(active.sum())
            if not num_active or position + 1 == sampling.max_new_tokens:
                break
            tokens = sampled.tokens
            if num_active < _COMPACT_BELOW * len(rows):
                state, rows, tokens = state.select(active), rows[active], tokens[active]
                active = torch.ones_like(rows, dtype=torch.bool)
            logits = self._runner.decode(state, tokens)

    def _assemble(self, prompts: PromptBatch, responses: _Responses, rows: Tensor) -> Rollout:
        """Gathers the responses of all data ranks and appends them to their prompts.

        Args:
            prompts: The global batch.
            responses: This rank's, filler rows at the end.
            rows: Prompt of each gathered response, -1 for fillers.
        """
        group, real = self._groups.data, rows >= 0
        gathered = [
            all_gather_rows(values, group).cpu()[real]
            for values in (
                responses.tokens,
                responses.logprobs,
                responses.lengths,
                responses.finished.to(torch.int64),
            )
        ]
        back = rows[real].argsort()
        tokens, logprobs, lengths, finished = (values[back] for values in gathered)
        longest = int(lengths.max())
        seq = int((prompts.lengths + lengths).max())
        joined = torch.nn.functional.pad(prompts.tokens, (0, max(0, seq - prompts.tokens.shape[1])))
        joined = joined[:, :seq].clone()
        columns = torch.arange(longest)[None]
        inside = columns < lengths[:, None]
        target = (prompts.lengths[:, None] + columns)[inside]
        row = torch.arange(prompts.num_rows)[:, None].expand_as(inside)[inside]
        joined[row, target] = tokens[:, :longest][inside]
        return Rollout(
            tokens=joined,
            lengths=prompts.lengths + lengths,
            prompt_lengths=prompts.lengths,
            logprobs=logprobs[:, :longest].masked_fill(~inside, 0.0),
            finished=finished.bool(),
        )
