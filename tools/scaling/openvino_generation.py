"""Generation by OpenVINO GenAI for each line of input, timed; run by `bench_generation.py`.

It runs in an environment of its own, with openvino-genai 2026.4 and optimum-intel and without
megachat, and takes the benchmark's settings as JSON in its only argument. The folder that they name
holds weights as HuggingFace keeps them, and prompts.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def export(weights: Path, folder: Path) -> None:
    """Converts a model; the pipeline also wants a tokenizer, which nothing is ever asked of."""
    intel: Any = importlib.import_module("optimum.intel")
    openvino: Any = importlib.import_module("openvino")
    convert = importlib.import_module("openvino_tokenizers").convert_tokenizer
    model = intel.OVModelForCausalLM.from_pretrained(
        weights, export=True, compile=False, load_in_8bit=False
    )
    model.save_pretrained(folder)
    parts = convert(byte_tokenizer(), with_detokenizer=True)
    for part, name in zip(parts, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(part, folder / f"openvino_{name}.xml")


def byte_tokenizer() -> Any:
    """Bytes and the control tokens of OPT."""
    tokenizers: Any = importlib.import_module("tokenizers")
    transformers: Any = importlib.import_module("transformers")
    words = ["<s>", "<pad>", "</s>", "<unk>"]
    words += sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


class Engine:
    """OpenVINO's continuous batching over a paged cache."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Converts and compiles."""
        self._library: Any = importlib.import_module("openvino_genai")
        openvino: Any = importlib.import_module("openvino")
        numpy: Any = importlib.import_module("numpy")
        folder, batch = Path(settings["folder"]), settings["batch"]
        export(folder / "weights", folder / "openvino")
        scheduler = self._library.SchedulerConfig()
        scheduler.cache_size = 4  # 10^9 bytes
        scheduler.max_num_batched_tokens = batch * settings["prompt"]
        scheduler.max_num_seqs = batch
        scheduler.enable_prefix_caching = False
        precision = PRECISIONS[settings["dtype"]]
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": settings["threads"],
        }
        self._pipeline = self._library.ContinuousBatchingPipeline(
            str(folder / "openvino"), scheduler, "CPU", properties
        )
        prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        self._prompts = [
            openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts
        ]
        self._settings = settings

    def answer(self, prompts: list[Any], new: int) -> list[list[int]]:
        """New tokens of each prompt."""
        config = self._library.GenerationConfig()
        config.max_new_tokens = new
        if self._settings["stop_ids"]:
            config.do_sample = True
            config.ignore_eos = False
            config.stop_token_ids = set(self._settings["stop_ids"])
        else:
            config.do_sample = False
            config.ignore_eos = True
            config.min_new_tokens = new
        answers = self._pipeline.generate(prompts, [config] * len(prompts))
        return [list(answer.m_generation_ids[0]) for answer in answers]

    def measure(self) -> dict[str, Any]:
        """Seconds until the first tokens of a batch, seconds of all, and all tokens."""
        start = time.perf_counter()
        self.answer(self._prompts[: self._settings["batch"]], 1)
        middle = time.perf_counter()
        tokens = self.answer(self._prompts, self._settings["new"])
        end = time.perf_counter()
        return {"prefill": middle - start, "total": end - middle, "tokens": tokens}


def main() -> None:
    """Measures until nobody asks any more."""
    engine = Engine(json.loads(sys.argv[1]))
    while sys.stdin.readline():
        sys.stdout.write(f"reply {json.dumps(engine.measure(), allow_nan=False)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
