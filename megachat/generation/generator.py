"""`Generator`: answers a global batch of prompts with the actor's present weights.

Each generation replica answers its share with continuous batching over a paged cache; the result is
the same global `Rollout` on every rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from megachat.errors import CapacityError, ConfigError, DataError
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.generation.graphs import recorder_for
from megachat.generation.kv_cache import PagedKvCache
from megachat.generation.runner import ModelRunner
from megachat.generation.sampling import Sampler, VocabularySlice, request_keys
from megachat.generation.session import Answers, DecodeSession, SessionStatistics
from megachat.generation.weights import GenerationWeights
from megachat.model.opt import OptModel
from megachat.ops.all_reduce import group_sum
from megachat.ops.finite import require_finite
from megachat.parallel.collectives import all_gather_rows
from megachat.parallel.lifetime import Owner
from megachat.parallel.memory import PhaseMemory
from megachat.records import PromptBatch, Rollout

_SAMPLED = "log-probs of the tokens that the actor sampled"


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedToken:
    """One token of one answer, as soon as it is known."""

    row: int
    """Which prompt it answers."""
    token: int
    logprob: float
    is_last: bool
    """Whether the answer is complete."""


class Generator(Owner):
    """Samples responses from a language model under a layout without pipeline stages."""

    def __init__(
        self,
        source: OptModel | GenerationWeights,
        *,
        stop_ids: Sequence[int],
        suppressed_ids: Sequence[int] = (),
        config: GenerationConfig | None = None,
        cache_memory: Callable[[int], PhaseMemory] | None = None,
    ) -> None:
        """Prepares generation; holds no copy of the weights and takes no memory yet.

        Args:
            source: The actor, whose training layout is then the generation layout too, or its
                weights as laid out for generation.
            stop_ids: Tokens that end a response and are part of it.
            suppressed_ids: Tokens that are never sampled.
            config: Memory and batch limits.
            cache_memory: Makes memory of at least a number of bytes for the cache; None chooses by
                the device.

        Raises:
            LayoutError: The model is cut into pipeline stages.
            CapacityError: The cache cannot hold one block.
            KernelError: The backend lacks an operation.
        """
        self._source = source
        self._settings = config if config is not None else GenerationConfig()
        self._stop_ids = tuple(stop_ids)
        self._suppressed_ids = tuple(suppressed_ids)
        weights = self._weights()
        self._config = weights.config
        self._groups = weights.groups
        self._device = weights.words.device
        self._cache = PagedKvCache(
            weights.config,
            tensor=weights.tensor_degree,
            num_bytes=int(self._settings.kv_cache_gb * 1e9),
            block_size=self._settings.block_size,
            max_sequences=self._settings.max_sequences,
            dtype=weights.words.dtype,
            device=self._device,
            memory=cache_memory,
        )
        self._placed: tuple[tuple[int, ...], ModelRunner] | None = None
        with ExitStack() as built:  # a backend that is not to be had takes the cache with it
            built.enter_context(self._cache)
            self._add_up = group_sum(
                weights.groups.tensor, self._settings.backend, device=self._device
            )
            built.callback(self._add_up.close)
            self._runner(weights)
            built.pop_all()
        self._statistics: SessionStatistics | None = None

    @property
    def cache(self) -> PagedKvCache:
        """Keys and values; `cache.release()` gives their memory back between phases."""
        return self._cache

    @property
    def statistics(self) -> SessionStatistics | None:
        """How this rank's share of the latest call went; None before the first."""
        return self._statistics

    def generate(
        self, prompts: PromptBatch, *, sampling: SamplingConfig, seed: int, num_samples: int = 1
    ) -> Rollout:
        """Answers every prompt.

        Args:
            prompts: The global batch, equal on every rank; each prompt has at least one token.
            sampling: How tokens are chosen.
            seed: Names the random streams together with each prompt's id.
            num_samples: Answers to each prompt, drawn independently.

        Returns:
            The global rollout on the CPU, rows in the order of the prompts, the samples of a prompt
            one after the other.

        Raises:
            CapacityError: A prompt and its longest response exceed the model's positions or the
                cache.
            DataError: A prompt is empty or has ids outside the vocabulary.
            ConfigError: `num_samples` is below 1.
            DivergenceError: On every rank, a logit is NaN or infinite.
            PhaseError: The generator was closed.
        """
        self.check_open()
        if num_samples < 1:
            raise ConfigError(f"num_samples is {num_samples}: ask for at least 1 answer a prompt")
        self._check(prompts, sampling)
        replicas, own = self._groups.data.size(), self._groups.data.rank()
        # Dealt by length, so that every data rank gets its share of long prompts.
        order = prompts.lengths.argsort(stable=True, descending=True)
        share = -(-prompts.num_rows // replicas)
        dealt = torch.nn.functional.pad(order, (0, share * replicas - len(order)), value=-1)
        mine = dealt[own::replicas]
        local = prompts.select(mine[mine >= 0])
        answers = None
        if local.num_rows:
            session = self._session(sampling)
            keys = request_keys(local.ids.tolist(), seed=seed, num_samples=num_samples)
            for _ in session.run(local, keys=keys):
                pass
            answers, self._statistics = session.answers, session.statistics
        rows = torch.cat([dealt[rank::replicas] for rank in range(replicas)])
        padded = self._padded(answers, share * num_samples, sampling.max_new_tokens)
        samples = torch.arange(num_samples)
        expanded = (rows[:, None] * num_samples + samples).masked_fill(rows[:, None] < 0, -1)
        prompt_rows = torch.arange(prompts.num_rows).repeat_interleave(num_samples)
        rollout = self._assemble(prompts.select(prompt_rows), padded, expanded.flatten())
        # A logit that is no number is in the log-prob of whatever was drawn beside it.
        require_finite(rollout.logprobs, what=_SAMPLED)
        return rollout

    def stream(
        self, prompts: PromptBatch, *, sampling: SamplingConfig, seed: int
    ) -> Iterator[StreamedToken]:
        """Answers prompts token by token, for a chat; each replica answers all of them.

        All ranks of a tensor group must iterate alike. Whoever stops early frees the rest.

        Args:
            prompts: At least one; each has at least one token.
            sampling: How tokens are chosen.
            seed: Names the random streams together with each prompt's id.

        Yields:
            The tokens in the order in which they are sampled.

        Raises:
            CapacityError: As `generate`.
            DataError: As `generate`.
            DivergenceError: As `generate`, at the first such token.
            PhaseError: As `generate`.
        """
        self.check_open()
        self._check(prompts, sampling)
        session = self._session(sampling)
        for new in session.run(prompts, keys=request_keys(prompts.ids.tolist(), seed=seed)):
            require_finite(new.logprobs, what=_SAMPLED)
            rows = zip(
                new.answers.tolist(), new.tokens.tolist(), new.logprobs.tolist(), strict=True
            )
            for row, token, logprob in rows:
                yield StreamedToken(row=row, token=token, logprob=logprob, is_last=row in new.ended)
        self._statistics = session.statistics

    def _weights(self) -> GenerationWeights:
        """The weights as they are now: an optimizer may move a model's parameters in memory."""
        if isinstance(self._source, GenerationWeights):
            return self._source
        return GenerationWeights.from_model(self._source)

    def _runner(self, weights: GenerationWeights) -> ModelRunner:
        """Computes with these weights; recorded steps last until the weights move in memory."""
        addresses = weights.addresses()
        if self._placed is not None and self._placed[0] != addresses:
            self._placed[1].close()
            self._placed = None
        if self._placed is None:
            recorder = recorder_for(self._device) if self._settings.graphs else None
            runner = ModelRunner(
                weights,
                self._cache,
                backend=self._settings.backend,
                add_up=self._add_up,
                recorder=recorder,
            )
            self._placed = addresses, runner
        return self._placed[1]

    def _end(self) -> None:
        """Recorded steps first: they hold kernels of the sum and of the communicator behind it."""
        if self._placed is not None:
            self._placed[1].close()
        self._placed = None
        self._add_up.close()
        self._cache.close()
        del self._source

    def _session(self, sampling: SamplingConfig) -> DecodeSession:
        weights = self._weights()
        return DecodeSession(
            self._runner(weights),
            self._cache,
            Sampler(
                sampling,
                stop_ids=self._stop_ids,
                suppressed_ids=self._suppressed_ids,
                vocabulary=VocabularySlice(
                    start=weights.vocab_start,
                    size=weights.local_vocab,
                    group=weights.groups.tensor,
                ),
                backend=self._settings.backend,
            ),
            prefill_tokens=self._settings.prefill_tokens,
            stop_ids=self._stop_ids,
            max_new_tokens=sampling.max_new_tokens,
        )

    def _check(self, prompts: PromptBatch, sampling: SamplingConfig) -> None:
        """Refuses, on every rank alike, prompts that do not fit the model or the cache."""
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
        longest = int(prompts.lengths.max())
        needed = longest + sampling.max_new_tokens
        if needed > self._config.max_positions:
            raise CapacityError(
                f"a prompt of {longest} tokens and a response of up to {sampling.max_new_tokens} "
                f"need {needed} positions, but the model has {self._config.max_positions}: shorten "
                "prompts or lower max_new_tokens"
            )
        blocks = -(-(needed - 1) // self._cache.block_size)
        if blocks > self._cache.num_blocks:
            raise CapacityError(
                f"a prompt of {longest} tokens and a response of up to {sampling.max_new_tokens} "
                f"need {blocks} blocks of {self._cache.block_size} tokens, "
                f"{blocks * self._cache.block_bytes} bytes, but the key-value cache has "
                f"{self._cache.num_blocks}: raise kv_cache_gb above "
                f"{blocks * self._cache.block_bytes / 1e9:.3g}"
            )

    def _padded(self, answers: Answers | None, rows: int, max_new_tokens: int) -> Answers:
        """A replica's answers with filler rows at the end, so that all replicas have as many."""
        size, device = (rows, max_new_tokens), self._device
        padded = Answers(
            tokens=torch.zeros(size, dtype=torch.int64, device=device),
            logprobs=torch.zeros(size, device=device),
            lengths=torch.zeros(rows, dtype=torch.int64, device=device),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
        )
        if answers is not None:
            num = len(answers.lengths)
            padded.tokens[:num] = answers.tokens
            padded.logprobs[:num] = answers.logprobs
            padded.lengths[:num] = answers.lengths
            padded.finished[:num] = answers.finished
        return padded

    def _assemble(self, prompts: PromptBatch, answers: Answers, rows: Tensor) -> Rollout:
        """Gathers the answers of all data ranks and appends them to their prompts.

        Args:
            prompts: The global batch, one row an answer.
            answers: This rank's, filler rows at the end.
            rows: Row of each gathered answer, -1 for fillers.
        """
        group, real = self._groups.data, rows >= 0
        gathered = [
            all_gather_rows(values, group).cpu()[real]
            for values in (
                answers.tokens,
                answers.logprobs,
                answers.lengths,
                answers.finished.to(torch.int64),
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
