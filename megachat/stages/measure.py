"""Finds the tokenizer that a run has or would have, to measure data with before the run."""

from dataclasses import dataclass
from pathlib import Path

from megachat.data.stage_data import training_texts
from megachat.data.tokenizer import Tokenizer, train_sentencepiece
from megachat.hub import Content, folder_on_disk
from megachat.stages.config import RunConfig
from megachat.stages.context import tokenizer_folder
from megachat.stages.starts import tokenizer_source

DEFAULT_TOKENIZER = "facebook/opt-125m"
"""Measures data of which no run is known; all published OPT models share it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """What lengths are counted with."""

    tokenizer: Tokenizer | None
    """None: words are counted."""
    origin: str
    """Where the tokenizer comes from, or why there is none."""


def named_measure(name: str) -> Measure:
    """A tokenizer by folder or hub name.

    Raises:
        CheckpointError: It is not on this machine.
        DataError: It breaks a rule of tokenizers.
    """
    return Measure(tokenizer=Tokenizer.load(name), origin=name)


def default_measure() -> Measure:
    """OPT's own tokenizer where the hub's cache has it; asks no network."""
    return _on_disk(DEFAULT_TOKENIZER)


def measure_of_run(config: RunConfig, *, folder: Path) -> Measure:
    """The tokenizer of a run: the one in its folder, or the one it would load or train.

    Args:
        config: The run.
        folder: For a tokenizer that is trained to look at its data, of no use afterwards.

    Raises:
        MegachatError: The data to train it on cannot be read, or it breaks a rule.
    """
    made = tokenizer_folder(config)
    if (made / "tokenizer.json").is_file():
        return Measure(tokenizer=Tokenizer.load(made), origin=str(made))
    section, source = config.tokenizer, tokenizer_source(config)
    if source is not None:
        return _on_disk(source)
    assert section.train is not None, "there is a source or a training"
    data = config.data.model_copy(update={"cache_dir": folder / "rows"})
    tokenizer = train_sentencepiece(training_texts(data), section.train, folder / "tokenizer")
    return Measure(
        tokenizer=tokenizer,
        origin=f"{tokenizer.vocab_size} pieces trained on these data, as the run will",
    )


def _on_disk(name: str) -> Measure:
    folder = folder_on_disk(name, Content.TOKENIZER)
    if folder is None:
        return Measure(
            tokenizer=None,
            origin=f"none, since the tokenizer of {name} is not on this machine: lengths are in "
            "words, and limits in tokens cannot be checked (give --tokenizer FOLDER)",
        )
    return Measure(tokenizer=Tokenizer.load(folder), origin=name)
