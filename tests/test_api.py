"""The program of README.md as printed, and what its factory refuses."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megachat.api import RoleSettings, Tokenizer, create_engine
from megachat.data.config import SentencePieceConfig
from megachat.data.tokenizer import train_sentencepiece
from megachat.errors import MegachatError
from megachat.model import Head, OptConfig
from tests.checkpoint import folders
from tests.harness import run_ranks
from tests.stages.tiny_run import worker, write_rows

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 25


def _program() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python api-program\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the two models that the program names, tiny and untrained."""
    folder = tmp_path_factory.mktemp("api")
    texts = write_rows(folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    settings = SentencePieceConfig(vocab_size=134)
    for stage, head in (("sft", Head.LANGUAGE_MODEL), ("reward", Head.SCALAR)):
        place = folder / "runs" / "a" / stage / "model"
        tokenizer = train_sentencepiece(texts, settings, place)
        config = OptConfig(
            vocab_size=tokenizer.vocab_size + 2,
            max_positions=64,
            hidden=16,
            ffn=32,
            layers=2,
            heads=2,
            embed_dim=16,
            init_std=0.25,
        )
        folders.write_folder(config, place, head=head)
    return folder


def _run(folder: Path, processes: int) -> list[str]:
    (folder / "program.py").write_text(_program(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "program.py", str(processes)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_program_of_the_readme_is_short_and_needs_no_stage() -> None:
    lines = [line for line in _program().splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES
    assert all(len(line) <= 100 for line in lines)
    assert not any("stages" in line for line in lines)


def test_the_program_of_the_readme_trains_on_one_process_and_on_two(models: Path) -> None:
    start = AutoModelForCausalLM.from_pretrained(models / "runs" / "a" / "sft" / "model")
    scores, weights = [], []
    for processes in (1, 2):
        lines = _run(models, processes)
        assert [line.split(":")[0] for line in lines] == ["step 0", "step 1", "step 2"]
        scores.append([float(re.findall(r"score (\S+),", line)[0]) for line in lines])
        saved = AutoModelForCausalLM.from_pretrained(models / "runs" / "mine")
        weights.append(torch.cat([value.flatten() for value in saved.parameters()]))
    first = torch.cat([value.flatten() for value in start.parameters()])
    assert (weights[0] - first).abs().max() > 1e-6
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    torch.testing.assert_close(weights[1], weights[0], atol=2e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(models / "runs" / "mine").eos_token == "</s>"


def _refusal(folder: Path, actor: str, reward: str, tensor: int) -> str:
    tokenizer = Tokenizer.load(folder / "runs" / "a" / "sft" / "model")
    try:
        create_engine(
            worker(),
            actor=RoleSettings(model=folder / "runs" / "a" / actor / "model", tensor=tensor),
            reward=RoleSettings(model=folder / "runs" / "a" / reward / "model"),
            tokenizer=tokenizer,
            total_steps=2,
        ).close()
    except MegachatError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("actor", "reward", "tensor", "message"),
    [
        ("sft", "reward", 1, ""),
        ("sft", "sft", 1, "score.weight is missing"),
        ("sft", "none", 1, "none"),
        ("sft", "reward", 3, "world size 1 is not a multiple of tensor 3"),
    ],
)
def test_the_factory_says_what_does_not_fit(
    models: Path, actor: str, reward: str, tensor: int, message: str
) -> None:
    [said] = run_ranks(1, _refusal, models, actor, reward, tensor)
    assert message in said and bool(said) == bool(message) and "\n" not in said
