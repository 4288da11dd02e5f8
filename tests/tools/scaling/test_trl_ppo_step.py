"""The peer's side of the benchmark, as far as it goes without TRL."""

import io

import pytest
import transformers

from tools.scaling import trl_ppo_step as peer


def test_a_step_is_taken_for_each_line_and_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the trainer calls: one beginning, an end of each step, until nobody asks for another."""
    monkeypatch.setattr("sys.stdin", io.StringIO("step\nstep\n"))
    steps = peer.callback(transformers, peer.Metronome())
    steps.on_train_begin(None, None, None)
    steps.on_step_end(None, None, None)
    with pytest.raises(SystemExit) as end:
        steps.on_step_end(None, None, None)
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(0 <= float(line.removeprefix("reply ")) < 60 for line in lines)


def test_the_tokenizer_has_the_control_ids_of_opt() -> None:
    tokenizer = peer.empty_tokenizer(transformers)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1, 2)
    padded = tokenizer.pad({"input_ids": [[5, 6], [7]]}, return_tensors=None)
    assert padded["input_ids"] in ([[5, 6], [7, 1]], [[5, 6], [1, 7]])
