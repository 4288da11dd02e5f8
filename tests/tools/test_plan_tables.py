"""The page in docs/ is what the planner says today."""

from pathlib import Path

import pytest
import typer

from tools import plan_tables


@pytest.fixture(scope="module")
def page() -> str:
    return plan_tables.page()


def test_the_page_is_what_the_command_writes(page: str) -> None:
    written = plan_tables.PAGE.read_text(encoding="utf-8")
    assert written == page, "run python tools/plan_tables.py"


def test_every_model_has_layouts_pools_cache_and_reshard(page: str) -> None:
    sections = page.split("\n## ")[1:]
    assert [text.split(" on ")[0] for text in sections] == [
        case.model for case in plan_tables.CASES
    ]
    for text in sections:
        for part in (
            "Actor: train tp", "generate tp", "During generation: ", "Predicted peak: ",
            "Predicted cache: ", " wave", "Predicted reshard: ", "Predicted PPO step (not measur",
            "Predicted GB on ranks ", "| actor kv cache |", "| actor foreign blocks |",
        ):  # fmt: skip
            assert part in text, part


def test_numbers_stand_under_the_word_predicted(page: str) -> None:
    assert "**Every number on this page is predicted.**" in page
    for line in page.splitlines():
        if line.startswith(("Peak", "Cache", "Reshard", "GB ")):
            pytest.fail(f"not labelled as predicted: {line}")


def test_a_page_that_is_out_of_date_is_found(
    page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plan_tables, "page", lambda: page)
    monkeypatch.setattr(plan_tables, "PAGE", tmp_path / "planning.md")
    with pytest.raises(typer.Exit):
        plan_tables.main(check=True)
    plan_tables.main(check=False)
    plan_tables.main(check=True)
