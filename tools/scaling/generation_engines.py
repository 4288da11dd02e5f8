"""The engines that `bench_generation.py` lets take turns, and the settings they share.

An engine is a function that answers all prompts once and says how long that took.
"""

import contextlib
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import DTYPES, peer_process
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from megachat.checkpoint.huggingface import read_config
from megachat.config import ConfigModel
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.generation.generator import Generator
from megachat.generation.kv_cache import block_bytes
from megachat.model.config import OptConfig
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.parallel.launch import num_cores
from megachat.records import PromptBatch

OURS = "megachat"
PEERS = ("transformers", "reference", "openvino")
"""HuggingFace's `generate`, megachat's own engine on plain torch, and OpenVINO GenAI."""
OPENVINO_SCRIPT = Path(__file__).with_name("openvino_generation.py")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""CPU time, with one thread, leaves out what other processes of a busy machine take."""


class Settings(ConfigModel):
    """What is measured; the options of the command line."""

    model: str = Field(default="facebook/opt-125m", description="Hub name of a published size.")
    weights: str | None = Field(default=None, description="HuggingFace folder, for --model.")
    random_weights: bool = Field(default=False, description="Draw the weights of --model.")
    batch: int = Field(default=8, ge=1, description="Prompts.")
    prompt: int = Field(default=128, ge=1, description="Tokens of each prompt.")
    new: int = Field(default=64, ge=2, description="Tokens of each answer, or at most.")
    mean: int | None = Field(
        default=None, ge=2, description="Sample, and let one token of so many end an answer."
    )
    waves: int = Field(
        default=1,
        ge=1,
        description="Batches of prompts: transformers answers one after the other, megachat puts "
        "the next prompt in the place of an answer that ended.",
    )
    dtype: str = Field(default="bf16", pattern="^(bf16|fp32)$", description="bf16 or fp32.")
    device: str = Field(default="cpu", pattern="^(cpu|cuda)$", description="cpu or cuda.")
    threads: int = Field(default_factory=num_cores, ge=1, description="Of the CPU.")
    block_size: int = Field(default=16, ge=1, description="Tokens in a block of the cache.")
    repeats: int = Field(default=3, ge=1, description="Measured runs of each engine.")
    clock: str = Field(
        default="wall", pattern="^(wall|cpu)$", description="wall, or cpu time of this process."
    )
    peer: list[str] = Field(
        default=[], description="transformers, reference or openvino; repeatable."
    )
    peer_python: str | None = Field(
        default=None, description="Interpreter of an environment with openvino-genai."
    )
    tensor: int = Field(
        default=1, ge=1, description="Also cut the model over so many processes, threads shared."
    )

    @property
    def backend(self) -> Backend:
        """This project's kernels for the device."""
        return Backend.CPU if self.device == "cpu" else Backend.CUDA

    @property
    def over_ranks(self) -> str:
        """Name of the engine that is cut."""
        return f"{OURS}, tp {self.tensor}"

    @property
    def config(self) -> OptConfig:
        """Architecture."""
        return read_config(self.model if self.weights is None else self.weights)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, spread over the vocabulary; none where all are equally long.

        Random weights make all tokens about equally likely, so lengths are geometric.
        """
        return tuple(range(4, self.config.vocab_size, self.mean)) if self.mean else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One answer to every prompt."""

    total: float
    """Seconds."""
    prefill: float
    """Seconds until the first token of every answer of a batch."""
    tokens: int
    """Of all answers."""


Run = Callable[[], tuple[Timing, Tensor]]
"""Answers once; the tokens are `[prompts, new]`, `NO_TOKEN` behind an answer's end."""
NO_TOKEN = -1


def megachat_engine(
    model: OptModel, prompts: PromptBatch, settings: Settings, *, backend: Backend
) -> Run:
    """This project's generator."""
    length = settings.prompt + settings.new
    blocks = settings.batch * -(-length // settings.block_size)
    size = block_bytes(
        model.config,
        tensor=model.groups.tensor.size(),
        block_size=settings.block_size,
        dtype=DTYPES[settings.dtype],
    )
    generator = Generator(
        model,
        stop_ids=settings.stop_ids,
        config=GenerationConfig(
            backend=backend,
            block_size=settings.block_size,
            kv_cache_gb=(blocks + 1) * size / 1e9,
            max_sequences=settings.batch,
            prefill_tokens=settings.batch * settings.prompt,
        ),
    )
    clock = CLOCKS[settings.clock]
    temperature = 1.0 if settings.mean else 0.0
    sampling = SamplingConfig(max_new_tokens=settings.new, temperature=temperature)

    def run() -> tuple[Timing, Tensor]:
        answers = torch.full((prompts.num_rows, settings.new), NO_TOKEN)
        counts = [0] * prompts.num_rows
        prefill = 0.0
        start = clock()
        for token in generator.stream(prompts, sampling=sampling, seed=0):
            if not any(counts):
                prefill = clock() - start
            answers[token.row, counts[token.row]] = token.token
            counts[token.row] += 1
        return Timing(total=clock() - start, prefill=prefill, tokens=sum(counts)), answers

    return run


def transformers_engine(
    folder: Path, prompts: PromptBatch, settings: Settings, *, device: torch.device
) -> Run:
    """HuggingFace's generation of the same weights; how long a prompt takes is timed apart."""
    library: Any = importlib.import_module("transformers")
    dtype = DTYPES[settings.dtype]
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    clock = CLOCKS[settings.clock]
    stops = torch.tensor(settings.stop_ids, dtype=torch.int64)
    batches = prompts.tokens.to(device).chunk(settings.waves)
    ending: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    if settings.mean:
        ending = {"do_sample": True, "top_k": 0, "eos_token_id": stops.tolist()}

    @torch.no_grad()
    def answer(batch: Tensor, new: int) -> Tensor:
        tokens: Tensor = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new,
            min_new_tokens=None if settings.mean else new,
            pad_token_id=model.config.pad_token_id,
            **ending,
        )[:, settings.prompt :]
        tokens = F.pad(tokens.cpu(), (0, new - tokens.shape[1]), value=NO_TOKEN)
        ended = torch.isin(tokens, stops).long()
        return tokens.masked_fill(ended.cumsum(dim=1) > ended, NO_TOKEN)

    def run() -> tuple[Timing, Tensor]:
        start = clock()
        answer(batches[0], 1)
        middle = clock()
        tokens = torch.cat([answer(batch, settings.new) for batch in batches])
        total, count = clock() - middle, int((tokens != NO_TOKEN).sum())
        return Timing(total=total, prefill=middle - start, tokens=count), tokens

    return run


def openvino_engine(ask: Callable[[], Any], settings: Settings) -> Run:
    """OpenVINO GenAI in its own process, by what that says of itself."""

    def run() -> tuple[Timing, Tensor]:
        reply = ask()
        rows = [torch.tensor(row) for row in reply["tokens"]]
        tokens = torch.stack(
            [F.pad(row, (0, settings.new - len(row)), value=NO_TOKEN) for row in rows]
        )
        count = sum(map(len, rows))
        return Timing(total=reply["total"], prefill=reply["prefill"], tokens=count), tokens

    return run


def openvino_process(
    prompts: PromptBatch, settings: Settings, folder: Path
) -> contextlib.AbstractContextManager[Callable[[], Any]]:
    """The process with OpenVINO."""
    assert settings.peer_python is not None
    (folder / "prompts.json").write_text(
        json.dumps(prompts.tokens.tolist(), allow_nan=False), encoding="utf-8"
    )
    request = settings.model_dump(mode="json")
    request |= {"folder": str(folder), "stop_ids": settings.stop_ids}
    log = folder / "openvino.log"
    return peer_process(settings.peer_python, OPENVINO_SCRIPT, request, log=log)
