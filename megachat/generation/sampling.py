"""The one place that turns logits into tokens: `SamplingConfig` and `Sampler`.

Each request draws from a random stream of its own, named by (seed, request id, position), so a
response does not depend on which other requests are in the batch, nor on the parallel layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megachat.config import ConfigModel
from megachat.parallel.rng import seed_for


class SamplingConfig(ConfigModel):
    """How response tokens are chosen."""

    max_new_tokens: int = Field(default=256, ge=1, description="Longest response, EOS included.")
    min_new_tokens: int = Field(
        default=1, ge=0, description="No stop token before this many tokens, it included."
    )
    temperature: float = Field(
        default=1.0, ge=0, description="Divides the logits; 0 takes the most likely token."
    )
    top_k: int = Field(default=0, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Keep the fewest tokens whose mass reaches p."
    )

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens "
                f"{self.max_new_tokens}: lower it"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTokens:
    """One new token for every row."""

    tokens: Tensor
    """[rows] int64."""
    logprobs: Tensor
    """[rows] float32, under the temperature-scaled distribution before any truncation."""


class Sampler:
    """Chooses the next token of every row of a batch."""

    def __init__(
        self, config: SamplingConfig, *, stop_ids: Sequence[int], suppressed_ids: Sequence[int]
    ) -> None:
        """Fixes the rules.

        Args:
            config: Temperature and truncation.
            stop_ids: Tokens that end a response.
            suppressed_ids: Tokens that are never chosen (padding and other control symbols).
        """
        self._config = config
        self._stop_ids = list(stop_ids)
        self._suppressed_ids = list(suppressed_ids)

    def sample(
        self, logits: Tensor, *, generators: Sequence[torch.Generator], position: int
    ) -> SampledTokens:
        """Chooses one token a row.

        Args:
            logits: `[rows, vocab]`, any float dtype.
            generators: The random stream of each row.
            position: Number of response tokens before this one.
        """
        config = self._config
        scaled = logits.float() / (config.temperature or 1.0)
        logprobs = scaled.log_softmax(dim=-1)
        allowed = scaled.clone()
        allowed[:, self._suppressed_ids] = -torch.inf
        if position + 1 < config.min_new_tokens:
            allowed[:, self._stop_ids] = -torch.inf
        if config.temperature == 0:
            tokens = allowed.argmax(dim=-1)
        else:
            tokens = self._draw(self._truncate(allowed), generators)
        chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
        return SampledTokens(tokens=tokens, logprobs=chosen)

    def _truncate(self, scaled: Tensor) -> Tensor:
        """Applies top-k, then top-p; what is cut becomes minus infinity."""
        config, vocab = self._config, scaled.shape[-1]
        if 0 < config.top_k < vocab:
            smallest = scaled.topk(config.top_k, dim=-1).values[:, -1:]
            scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
        if config.top_p < 1.0:
            ordered, order = scaled.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(dim=-1)
            # A token stays while the mass before it is below p, so the one that reaches p stays.
            outside = probabilities.cumsum(dim=-1) - probabilities >= config.top_p
            scaled = scaled.masked_fill(outside.scatter(1, order, outside), -torch.inf)
        return scaled

    @staticmethod
    def _draw(scaled: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """An exponential race (Gumbel-max): Exp(1) / p is smallest at each token with chance p."""
        noise = torch.empty_like(scaled)
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
        return (scaled.softmax(dim=-1) / noise).argmax(dim=-1)


def request_generators(
    ids: Sequence[int], *, seed: int, device: torch.device
) -> list[torch.Generator]:
    """The random stream of each request."""
    return [
        torch.Generator(device=device).manual_seed(seed_for(seed, "request", request))
        for request in ids
    ]
