"""HuggingFace's generation as the oracle, and the cases that every layout answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.generation.generator import Generator
from megachat.model import OptConfig
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.records import PromptBatch
from tests.model import reference as ref

CONFIGS = {"pre-LN": ref.PRE_LN, "post-LN": ref.POST_LN}
LENGTHS = (3, 1, 9, 5, 2, 7, 12)
SEED = 11
STOPS = (2, *range(40, 52))
"""A tenth of the vocabulary, so that sampled responses end at many lengths."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `generate`."""

    sampling: SamplingConfig
    rows: tuple[int, ...] = tuple(range(len(LENGTHS)))
    """Which of the prompts, in which order."""
    width: int = max(LENGTHS)
    """Columns of the prompt batch."""
    seed: int = SEED
    first_id: int = 1000
    """Identity of the first prompt; the others follow."""
    stop_ids: Sequence[int] = STOPS
    suppressed_ids: Sequence[int] = field(default=(1,))


def prompts(config: OptConfig, case: Case) -> PromptBatch:
    """Ragged prompts in which pad, BOS and EOS ids stand between the others."""
    rows = torch.full((len(LENGTHS), max(case.width, *LENGTHS)), config.pad_id)
    for row, length in enumerate(LENGTHS):
        generator = torch.Generator().manual_seed(row)
        rows[row, :length] = torch.randint(0, config.vocab_size, (length,), generator=generator)
        rows[row, length // 2] = (config.pad_id, config.eos_id)[row % 2]
    ids = case.first_id + torch.arange(len(LENGTHS))
    batch = PromptBatch(tokens=rows, lengths=torch.tensor(LENGTHS), ids=ids)
    return batch.select(torch.tensor(case.rows))


def generator(model: OptModel, case: Case, *, backend: Backend = Backend.REFERENCE) -> Generator:
    """The generator of a case."""
    return Generator(
        model,
        stop_ids=case.stop_ids,
        suppressed_ids=case.suppressed_ids,
        config=GenerationConfig(backend=backend),
    )


@torch.no_grad()
def oracle(config: OptConfig) -> nn.Module:
    """HuggingFace's model with weights for which no token dominates and logits reach some nats."""
    model = ref.huggingface_model(config)
    for name, parameter in model.named_parameters():
        if config.layer_norm_first and ".layers." in name and parameter.ndim == 2:
            parameter.mul_(8)
        elif name.endswith(("decoder.final_layer_norm.weight", "decoder.final_layer_norm.bias")):
            parameter.mul_(4)
        elif name.endswith("project_out.weight"):
            parameter.mul_(30)
    return model


@torch.no_grad()
def greedy(
    model: nn.Module, prompt: Tensor, *, sampling: SamplingConfig, stop_ids: Sequence[int]
) -> list[int]:
    """HuggingFace's greedy answer to one prompt, its stop token included."""
    answer = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        # HuggingFace counts the tokens before the stop token.
        min_new_tokens=max(0, sampling.min_new_tokens - 1),
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
    )
    return answer[0, len(prompt) :].tolist()


@torch.no_grad()
def logprobs(model: nn.Module, row: Tensor, *, prompt_length: int, temperature: float) -> Tensor:
    """HuggingFace's log-probs of the tokens after the prompt."""
    logits = model(row[None]).logits[0, prompt_length - 1 : -1].float() / temperature
    return logits.log_softmax(dim=-1).gather(1, row[prompt_length:, None])[:, 0]
