"""The one place for the settings of generation: how tokens are chosen, with how much memory."""

from typing import Self

from pydantic import Field, model_validator

from megachat.config import ConfigModel
from megachat.ops.registry import Backend


class SamplingConfig(ConfigModel):
    """How response tokens are chosen."""

    max_new_tokens: int = Field(default=256, ge=1, description="Longest response, EOS included.")
    min_new_tokens: int = Field(
        default=1, ge=0, description="No stop token before this many tokens, it included."
    )
    temperature: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Divides the logits; 0 takes the most likely token.",
    )
    top_k: int = Field(default=0, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Keep the fewest tokens whose mass reaches p."
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Divides positive and multiplies negative logits of tokens that the prompt or "
        "the response holds already; 1 changes nothing.",
    )

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens "
                f"{self.max_new_tokens}: lower it"
            )
        return self


class GenerationConfig(ConfigModel):
    """How generation uses memory and time; nothing here changes an answer."""

    kv_cache_gb: float = Field(
        default=4.0,
        gt=0,
        le=100_000,
        description="Largest key-value cache per rank, in 10^9 bytes; what a batch does not need "
        "stays untouched.",
    )
    block_size: int = Field(default=16, ge=1, description="Tokens in a block of the cache.")
    max_sequences: int = Field(default=256, ge=1, description="Answers in work at once per rank.")
    prefill_tokens: int = Field(
        default=4096, ge=1, description="Prompt tokens that one step computes at most."
    )
    backend: Backend = Field(
        default=Backend.REFERENCE,
        strict=False,
        description="Who computes the operations of a step: plain torch, our CPU kernels or our "
        "CUDA kernels.",
    )
    graphs: bool = Field(
        default=True,
        description="Record decode steps as CUDA graphs and replay them; without meaning on a CPU.",
    )
