"""What a person is told at the end: the closing summary and the report."""

from pathlib import Path

import pytest

from megachat.data.config import Stage
from megachat.stages.config import RunConfig
from megachat.stages.context import prepare_output, stage_fingerprint, stage_folder
from megachat.stages.results import (
    Reply,
    ReshardCost,
    StageMemory,
    StageResult,
    read_result,
    write_result,
)
from megachat.stages.summary import write_run_report
from tests.stages import tiny_run

RESHARD = ReshardCost(
    train="tp2.pp2.dp2",
    generate="tp2.pp1.dp4",
    count=12,
    seconds=0.01234,
    received_bytes=1234567.0,
    redundant_bytes=0.0,
)

MEMORY = {
    Stage.SFT: StageMemory(
        least_bytes=1_200_000_000, most_bytes=1_310_000_000, most_rank=3, measure="what is counted"
    ),
    Stage.REWARD: StageMemory(
        least_bytes=999_000_000, most_bytes=1_001_000_000, most_rank=0, measure="what is counted"
    ),
    Stage.PROMPTS: None,
}
"""Ranks that differ, ranks that do not at this precision, and a stage that an older version ran."""


def _result(config: RunConfig, stage: Stage, **metrics: float | None) -> StageResult:
    return StageResult(
        fingerprint=stage_fingerprint(config, stage),
        seconds=83.0,
        metrics={**metrics, "steps": 12},
        phase_seconds={"generate": 30.0, "train actor": 10.0},
        replies=[Reply(prompt="how are you", before="bad [b]x[/b]", after="very <well>")],
        reshard=RESHARD if stage is Stage.PROMPTS else None,
        memory=MEMORY[stage],
        ended_by={Stage.SFT: "max_steps", Stage.REWARD: "epochs", Stage.PROMPTS: None}[stage],
    )


SFT = {"perplexity_before": 130.04, "perplexity_after": 41.26}
REWARD = {"accuracy": 0.8725, "margin": 1.372}
RLHF = {
    "score_before": -0.11,
    "score_after": 0.82,
    "score_gain_in_std": 0.934,
    "distinct2_before": 0.71,
    "distinct2_after": 0.69,
    "finished_before": 0.5,
    "finished_after": 0.625,
    "tokens_before": 9.1,
    "tokens_after": 8.4,
    "kl": 0.1234,
}
TRUTH = {
    "truth_before": 0.05,
    "truth_after": 0.31,
    "truth_gain": 0.26,
    "truth_gain_low": 0.21,
    "truth_gain_high": 0.31,
    "positive_share_before": 0.02,
    "positive_share_after": 0.08,
}


def _report(config: RunConfig) -> tuple[str, str]:
    """(closing summary, report) of what lies in the run folder."""
    found = {stage: read_result(stage_folder(config, stage)) for stage in Stage}
    done = {stage: result for stage, result in found.items() if result is not None}
    write_run_report(config, done, command="megachat train --config x.toml", duration_s=321.0)
    return tuple(
        (config.run.output / name).read_text(encoding="utf-8")
        for name in ("summary.txt", "report.html")
    )


def test_all_stages_are_summed_up_with_their_figures(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    prepare_output(config)
    for stage, metrics in zip(Stage, (SFT, REWARD, RLHF | TRUTH), strict=True):
        write_result(stage_folder(config, stage), _result(config, stage, **metrics))
    text, html = _report(config)
    for figure in ("130.0 -> 41.3", "87.2%", "margin 1.37", "-0.11 -> 0.82", "0.123", "12"):
        assert figure in text, figure
    rows = [line.split() for line in text.splitlines()]
    for row in (
        "ground-truth score 0.050 0.310",
        "share of positive words 0.020 0.080",
        "tokens per reply 9.100 8.400",
        "distinct-2 of the replies 0.710 0.690",
        "generate 30.0 s 75.0 %",
        "Reshard of the actor, tp2.pp2.dp2 -> tp2.pp1.dp4, mean of 12",
        "milliseconds 12.3",
        "bytes received 1,234,567",
        "bytes held twice 0",
    ):
        assert row.split() in rows, row
    for line in ("prompt  how are you", "before  bad [b]x[/b]", "after   very <well>"):
        assert line in text.splitlines()
    for figure in ("41.3", "87.2%", "+0.93 SD", "0.123", "+0.260", "0.210 to 0.310", "1,234,567"):
        assert figure in html, figure
    assert "megachat train --config x.toml" in html and "very &lt;well&gt;" in html
    for folder in ("sft", "reward", "rlhf"):
        assert str(config.run.output / folder / "model") in text


def test_the_key_that_ended_a_stage_stands_beside_its_steps(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    prepare_output(config)
    for stage, metrics in zip(Stage, (SFT, REWARD, RLHF), strict=True):
        write_result(stage_folder(config, stage), _result(config, stage, **metrics))
    text, html = _report(config)
    stages = [line.split() for line in text.splitlines() if "1m23s" in line]
    cells = [words[words.index("12") + 1] for words in stages]
    assert cells == ["max_steps", "epochs", "-"]
    assert "ended by" in text and "ended by" in html and "max_steps" in html


def test_skipped_updates_stand_beside_the_steps_of_their_stage(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    prepare_output(config)
    skipped = {"skipped_steps": 3}
    for stage, metrics in zip(Stage, (SFT, REWARD | skipped, RLHF), strict=True):
        write_result(stage_folder(config, stage), _result(config, stage, **metrics))
    text, html = _report(config)
    assert text.count("12 (3 skipped)") == text.count(" skipped)") == 1
    assert "12 (3 skipped)" in html


def test_a_figure_that_does_not_exist_is_a_dash(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    prepare_output(config)
    missing: tuple[dict[str, float | None], ...] = (
        {**SFT, "perplexity_before": None},
        {**REWARD},
        {**RLHF, "distinct2_before": None, "distinct2_after": None},
    )
    for stage, metrics in zip(Stage, missing, strict=True):
        write_result(stage_folder(config, stage), _result(config, stage, **metrics))
    text, html = _report(config)
    assert "perplexity - -> 41.3" in text and "from -, held-out" in html
    rows = [line.split() for line in text.splitlines()]
    assert "distinct-2 of the replies - -".split() in rows


def test_a_run_that_has_done_one_stage_is_summed_up_too(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    prepare_output(config)
    write_result(stage_folder(config, Stage.SFT), _result(config, Stage.SFT, **SFT))
    text, html = _report(config)
    assert "130.0 -> 41.3" in text and "41.3" in html
    assert "Reshard" not in text and "Held-out prompts" not in text and "Score gain" not in html


def test_without_a_judge_no_truth_is_reported(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    prepare_output(config)
    write_result(stage_folder(config, Stage.PROMPTS), _result(config, Stage.PROMPTS, **RLHF))
    text, html = _report(config)
    assert "ground-truth" not in text and "Ground truth" not in html and "0.82" in text


def test_the_columns_of_the_tables_line_up(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    prepare_output(config)
    write_result(stage_folder(config, Stage.PROMPTS), _result(config, Stage.PROMPTS, **RLHF))
    lines = _report(config)[0].splitlines()
    first = lines.index("Held-out prompts, temperature 1")
    assert len({len(line) for line in lines[first + 1 : first + 7]}) == 1


def test_the_report_of_a_real_run_has_its_figures_and_curves(finished: RunConfig) -> None:
    html = (finished.run.output / "report.html").read_text(encoding="utf-8")
    figures = tiny_run.read_result_metrics(finished, Stage.SFT)
    assert f"{figures['perplexity_after']:.1f}" in html
    assert finished.run.title in html and html.count("<img") + html.count("<svg") > 3


@pytest.mark.parametrize("stage", list(Stage))
def test_the_results_of_a_real_run_have_what_the_summary_needs(
    stage: Stage, finished: RunConfig
) -> None:
    needed = {Stage.SFT: SFT, Stage.REWARD: REWARD, Stage.PROMPTS: RLHF}[stage]
    assert {*needed, "steps"} <= set(tiny_run.read_result_metrics(finished, stage))


def test_the_peak_memory_of_a_rank_is_told_for_each_stage(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    prepare_output(config)
    for stage, metrics in zip(Stage, (SFT, REWARD, RLHF), strict=True):
        write_result(stage_folder(config, stage), _result(config, stage, **metrics))
    text, html = _report(config)
    lines = text.splitlines()
    header = next(number for number, line in enumerate(lines) if "peak memory a rank" in line)
    sft, reward, ppo, note = lines[header + 1 : header + 5]
    assert "1.20 to 1.31 GB" in sft and " 1.00 GB" in reward and "not measured" in ppo
    assert note.strip() == "memory: what is counted"
    for said in ("peak memory a rank", "1.20 to 1.31 GB", "memory: what is counted"):
        assert said in html


def test_a_finished_run_has_measured_the_memory_of_its_stages(finished: RunConfig) -> None:
    for stage in Stage:
        result = read_result(stage_folder(finished, stage))
        assert result is not None and result.memory is not None
        assert 50e6 < result.memory.least_bytes <= result.memory.most_bytes < 50e9
