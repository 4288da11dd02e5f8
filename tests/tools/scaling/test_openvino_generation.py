"""OpenVINO is asked for what the benchmark says; its libraries are stand-ins."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openvino_generation as script
import pytest

SETTINGS = {
    "batch": 2,
    "prompt": 3,
    "new": 5,
    "dtype": "fp32",
    "threads": 7,
    "stop_ids": [],
}
PROMPTS = [[4, 5, 6], [7, 8, 9], [10, 11, 12]]


class _Pipeline:
    """Answers with as many tokens as it may and remembers what it was asked."""

    asked: list[tuple[int, Any]] = []
    made: list[Any] = []

    def __init__(self, *arguments: Any) -> None:
        self.made.append(arguments)

    def generate(self, prompts: list[Any], configs: list[Any]) -> list[Any]:
        self.asked.append((len(prompts), configs[0]))
        new = configs[0].max_new_tokens
        return [SimpleNamespace(m_generation_ids=[[20] * new]) for _ in prompts]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Stand-ins for what only OpenVINO's environment has; files that are saved."""
    saved: list[Path] = []
    model = SimpleNamespace(save_pretrained=saved.append)
    loader = SimpleNamespace(from_pretrained=lambda weights, **_: model)
    modules = {
        "optimum.intel": SimpleNamespace(OVModelForCausalLM=loader),
        "openvino": SimpleNamespace(
            save_model=lambda _, path: saved.append(path), Tensor=lambda array: array
        ),
        "openvino_tokenizers": SimpleNamespace(convert_tokenizer=lambda *_, **__: (1, 2)),
        "openvino_genai": SimpleNamespace(
            SchedulerConfig=SimpleNamespace,
            GenerationConfig=SimpleNamespace,
            ContinuousBatchingPipeline=_Pipeline,
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(script.sys.modules, name, module)
    monkeypatch.setattr(_Pipeline, "asked", [])
    monkeypatch.setattr(_Pipeline, "made", [])
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    return saved


def test_a_measurement_answers_one_batch_by_one_token_and_then_everything(
    libraries: list[Path], tmp_path: Path
) -> None:
    engine = script.Engine(SETTINGS | {"folder": str(tmp_path)})
    folder = tmp_path / "openvino"
    assert libraries == [
        folder,
        folder / "openvino_tokenizer.xml",
        folder / "openvino_detokenizer.xml",
    ]
    ((path, scheduler, device, properties),) = _Pipeline.made
    assert (path, device) == (str(folder), "CPU")
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (2, 6)
    assert properties["INFERENCE_PRECISION_HINT"] == "f32"
    assert properties["INFERENCE_NUM_THREADS"] == 7
    reply = engine.measure()
    assert reply["tokens"] == [[20] * 5] * 3
    assert reply["prefill"] >= 0 and reply["total"] >= 0
    (first, one), (every, all_tokens) = _Pipeline.asked
    assert (first, one.max_new_tokens, every) == (2, 1, 3)
    assert all_tokens.ignore_eos and all_tokens.min_new_tokens == 5
    assert not all_tokens.do_sample


def test_with_stop_tokens_it_draws_and_may_end_early(libraries: list[Path], tmp_path: Path) -> None:
    engine = script.Engine(SETTINGS | {"folder": str(tmp_path), "stop_ids": [4, 36]})
    engine.measure()
    config = _Pipeline.asked[-1][1]
    assert config.do_sample and not config.ignore_eos and config.stop_token_ids == {4, 36}


def test_it_measures_once_for_each_line(
    libraries: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = json.dumps(SETTINGS | {"folder": str(tmp_path)})
    monkeypatch.setattr(script.sys, "argv", ["script", request])
    monkeypatch.setattr(script.sys, "stdin", io.StringIO("again\nagain\n"))
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert json.loads(line.removeprefix("reply "))["tokens"] == [[20] * 5] * 3


def test_the_tokenizer_knows_all_bytes() -> None:
    tokenizer = script.byte_tokenizer()
    assert len(tokenizer) == 4 + 256
    assert tokenizer.decode(tokenizer("a b")["input_ids"]).strip() == "a b"
