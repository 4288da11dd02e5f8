"""The command as a user types it; that it is fast is part of its promise."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megachat.cli.main import app

PLAN_175B = (
    "plan --model facebook/opt-175b --critic facebook/opt-350m --nodes 8 --gpus-per-node 8 "
    "--gpu-memory-gb 80"
)


def run(command: str) -> str:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    return result.output


def error_of(command: str) -> str:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_opt_175b_is_planned_as_json() -> None:
    content = json.loads(run(f"{PLAN_175B} --json"))
    assert content["model"] == "facebook/opt-175b"
    assert content["actor"]["parameters"] > 170e9
    assert content["memory"]["peak_bytes"] <= content["memory"]["budget_bytes"]
    assert content["kv_cache"]["waves"] >= 2
    assert "offload_optimizer" in content["measures"]
    assert "search" not in content


def test_layouts_can_be_fixed() -> None:
    content = json.loads(run(f"{PLAN_175B} --train 8,8,1 --generate 8 --json"))
    layout = {"tensor": 8, "pipeline": 8, "data": 1}
    assert {key: content["actor"][key] for key in layout} == layout
    assert content["generation"]["tensor"] == 8
    assert content["critic"]["data"] == 64


def test_a_stated_reserve_replaces_the_count() -> None:
    memory = json.loads(run(f"{PLAN_175B} --reserved-gb 3 --train 8,8,1 --generate 8 --json"))[
        "memory"
    ]
    assert {part["what"]: part["bytes"] for part in memory["reserved"]} == {
        "stated": 3 * 10**9,
        "margin": 24 * 10**8,
    }
    assert memory["budget_bytes"] == (80 - 3 - 2.4) * 10**9


def test_the_search_is_ranked() -> None:
    content = json.loads(run(f"{PLAN_175B} --search --json --limit 2"))["search"]
    seconds = [plan["predicted_seconds"] for plan in content["plans"]]
    assert seconds == sorted(seconds) and len(seconds) == 2
    assert all(item["reason"] for item in content["refusals"])


def test_tables_are_readable_without_a_terminal() -> None:
    text = run(f"{PLAN_175B} --train 8,8,1 --generate 8 --search")
    for part in ("facebook/opt-175b", "actor gradients", "11.3 lent", "waves", "not measured"):
        assert part in text


def test_markdown_is_a_section() -> None:
    assert run("plan --model facebook/opt-125m --markdown").startswith("## facebook/opt-125m with")


def test_a_folder_of_a_model_is_read(tmp_path: Path) -> None:
    values = {
        "model_type": "opt",
        "vocab_size": 640,
        "max_position_embeddings": 600,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    content = json.loads(
        run(f"plan --model {tmp_path} --critic {tmp_path} --gpus-per-node 2 --json")
    )
    assert content["actor"]["parameters"] < 1e6


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan --model opt-9b", "ConfigError: opt-9b: neither a folder"),
        ("plan --model facebook/opt-125m --gpu b200", "ConfigError: --gpu b200: expected one of"),
        ("plan --model facebook/opt-125m --train 8x1x1", "expected TENSOR,PIPELINE,DATA"),
        ("plan --model facebook/opt-125m --train 8,1,1", "LayoutError: attention heads 12"),
        (
            "plan --model facebook/opt-125m --nodes 0",
            "ConfigError: --nodes 0: expected a number from 1 to",
        ),
        ("plan --model facebook/opt-125m --nodes 1001", "--nodes 1001: expected a number from 1"),
        ("plan --model facebook/opt-125m --gpu-memory-gb inf", "--gpu-memory-gb inf: expected"),
        ("plan --model facebook/opt-125m --gpu-memory-gb nan", "--gpu-memory-gb nan: expected"),
        (
            "plan --model facebook/opt-125m --nodes 1000 --gpus-per-node 64",
            "CapacityError: 1000 nodes x 64 GPUs = 64000: layouts are searched on up to 16000",
        ),
        ("plan --model facebook/opt-125m --rank 8", "the job has ranks 0 to 7"),
        (
            "plan --model facebook/opt-125m --prompts 0",
            "ConfigError: --prompts 0: expected a number from 1 to 1,048,576",
        ),
        ("plan --model facebook/opt-125m --limit 0", "--limit 0"),
        ("plan --model facebook/opt-175b", "CapacityError: "),
        ("plan --model facebook/opt-175b", "of 80.0 GB reserved: context 0.8"),
    ],
)
def test_errors_are_one_line(command: str, message: str) -> None:
    assert message in error_of(command)


@pytest.mark.parametrize("content", ["[]", '{"a": ' + "[" * 100_000, "\ud83d", "{", "null"])
def test_a_config_json_that_is_no_object_is_refused_in_one_line(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", errors="surrogatepass"))
    assert str(path) in error_of(f"plan --model {tmp_path}")


def test_a_thousand_nodes_are_planned_in_seconds() -> None:
    """In one or two where nothing else runs; here other tests do, and a core is shared."""
    started = time.process_time()
    text = run("plan --model facebook/opt-13b --nodes 1000")
    assert time.process_time() - started < 6.0
    assert "not measured" in text


def test_a_plan_waits_for_no_heavy_module() -> None:
    """torch alone takes longer to import than a plan of OPT-175B takes."""
    code = (
        "import sys; from megachat.cli.main import app; "
        f"app({PLAN_175B.split()!r} + ['--json'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kv_cache"]["num_blocks"] > 0
