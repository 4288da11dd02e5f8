"""One PPO step of TRL's trainer for each line of input, timed; run by `bench_ppo_step.py`.

It runs in an environment of its own, with TRL 1.8 and without megachat, and takes the benchmark's
settings as JSON in its only argument. The folder that they name holds weights and prompts.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


class Metronome:
    """Waits for a line before each step and says after it how long it took."""

    def __init__(self) -> None:
        """Nothing is timed yet."""
        self._start = 0.0

    def wait(self) -> None:
        """Ends the process where nobody asks for another step."""
        if not sys.stdin.readline():
            raise SystemExit(0)
        self._start = time.perf_counter()

    def tell(self) -> None:
        """Writes one line."""
        sys.stdout.write(f"reply {time.perf_counter() - self._start}\n")
        sys.stdout.flush()


def callback(transformers: Any, metronome: Metronome) -> Any:
    """TRL's trainer calls it around each of its steps."""

    class Steps(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            metronome.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            metronome.tell()
            metronome.wait()

    return Steps()


def empty_tokenizer(transformers: Any) -> Any:
    """The trainer asks for ids of control tokens and pads; nothing is ever tokenised."""
    tokenizers = importlib.import_module("tokenizers")
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def build_trainer(settings: dict[str, Any], metronome: Metronome) -> Any:
    """TRL's PPO trainer on the four models, with the schedule of the benchmark's own step."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    ppo = importlib.import_module("trl.experimental.ppo")
    torch.set_num_threads(settings["threads"])
    folder, rows = Path(settings["folder"]), settings["batch"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]]

    def load(kind: str, name: str) -> Any:
        return getattr(transformers, kind).from_pretrained(folder / name, dtype=dtype)

    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    dataset = importlib.import_module("datasets").Dataset.from_dict({"input_ids": prompts})
    arguments = ppo.PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=rows,
        num_mini_batches=1,
        num_ppo_epochs=1,
        num_sample_generations=0,
        response_length=settings["new"],
        temperature=1.0,
        total_episodes=10_000 * rows,
        learning_rate=1e-6,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return ppo.PPOTrainer(
        args=arguments,
        processing_class=empty_tokenizer(transformers),
        model=load("AutoModelForCausalLM", "policy"),
        ref_model=load("AutoModelForCausalLM", "policy"),
        reward_model=load("AutoModelForSequenceClassification", "reward"),
        value_model=load("AutoModelForSequenceClassification", "reward"),
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[callback(transformers, metronome)],
    )


if __name__ == "__main__":
    build_trainer(json.loads(sys.argv[1]), Metronome()).train()
