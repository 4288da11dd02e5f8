"""An engine in another process is timed by what that says; the rest: `test_bench_generation`."""

import sys
from pathlib import Path

import generation_engines as engines
import pytest
from benchmark import random_prompts

_OPENVINO = """
import json, pathlib, sys
request = json.loads(sys.argv[1])
prompts = json.loads(pathlib.Path(request["folder"], "prompts.json").read_text())
assert request["stop_ids"] == list(range(4, 50272, 9000)) and len(prompts[0]) == request["prompt"]
for _ in sys.stdin:
    tokens = [[5] * (request["new"] - number) for number, _ in enumerate(prompts)]
    print("reply", json.dumps({"prefill": 0.5, "total": 4.0, "tokens": tokens}), flush=True)
"""


def test_openvino_is_timed_by_what_its_process_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the script, which speaks as it does."""
    script = tmp_path / "script.py"
    script.write_text(_OPENVINO)
    monkeypatch.setattr(engines, "OPENVINO_SCRIPT", script)
    settings = engines.Settings(
        batch=2, prompt=3, new=6, mean=9000, peer=["openvino"], peer_python=sys.executable
    )
    prompts = random_prompts(50, batch=2, length=3)
    with engines.openvino_process(prompts, settings, tmp_path) as ask:
        timing, tokens = engines.openvino_engine(ask, settings)()
    assert timing == engines.Timing(total=4.0, prefill=0.5, tokens=11)
    assert tokens.tolist() == [[5] * 6, [5] * 5 + [engines.NO_TOKEN]]
