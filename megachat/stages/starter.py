"""Writes the run.toml that a person begins with: their files, a tiny model, limits that fit both.

The rows are looked at as a run would see them, so what is written trains at once: limits hold nine
of ten rows whole, batches are no larger than what there is, and steps end within minutes.
"""

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megachat.config import build_config
from megachat.data.chat import ChatConfig
from megachat.data.config import DataConfig, SentencePieceConfig, SourceConfig, Stage
from megachat.data.inspection import Lengths, SourceView, limited, look_at
from megachat.data.own_formats import Render
from megachat.data.stage_data import shares_of, training_texts
from megachat.data.tokenizer import train_sentencepiece
from megachat.errors import ConfigError, DataError
from megachat.stages.config import RunConfig
from megachat.stages.results import write_text

CONFIG_NAME = "run.toml"
LOOKED_AT = 10_000
"""Records of each source that limits and sizes are derived from."""

_MARKERS = ChatConfig(system="<human> ", human="<human> ", assistant="<bot>")
"""One token each in a vocabulary that is trained for the run."""
_LEAST_VOCABULARY = 1024
_SHORTEST_LIMIT, _LONGEST_LIMIT = 16, 128
"""Tokens of a prompt and of an answer that a tiny model on a processor is given at most."""
_LARGEST_BATCH = 32
_SUPERVISED_STEPS, _PPO_STEPS = 80, 8
"""Steps of a stage at most."""
_MOST_EPOCHS = 6
_LEAST_ROWS = 2
"""Rows of a stage: one to train on and one that is held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Starter:
    """A configuration to begin with."""

    text: str
    stages: tuple[Stage, ...]
    """What the rows can serve; without data all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Sizes that fit the data."""

    prompt_tokens: int = 64
    answer_tokens: int = 64
    vocabulary: int = _LEAST_VOCABULARY
    rows: tuple[int, int, int] = (1000, 2000, 2000)
    """Rows to train on in each stage."""
    is_whole: bool = False
    """Whether all records were looked at."""

    def batch(self, stage: Stage) -> int:
        """The largest power of two with which an epoch has some four steps."""
        size = 1
        while size < _LARGEST_BATCH and 8 * size <= self._rows(stage):
            size *= 2
        return size

    def length(self, stage: Stage, *, most: int) -> str:
        """The key that ends the stage: epochs of a small set, steps of a large one."""
        an_epoch = max(1, self._rows(stage) // self.batch(stage))
        if not self.is_whole or an_epoch >= most:
            return f"max_steps = {most}"
        return f"epochs = {min(_MOST_EPOCHS, most // an_epoch)}"

    def _rows(self, stage: Stage) -> int:
        return self.rows[list(Stage).index(stage)]


def starter(folder: Path, sources: Sequence[SourceConfig], *, scratch: Path) -> Starter:
    """The configuration for some sources, or for a file that is still to be named.

    Args:
        folder: Of the configuration and the run.
        sources: Files of one's own; empty leaves a place to fill in.
        scratch: For prepared rows, of no use afterwards.

    Raises:
        DataError: A source cannot be read, or has too few rows.
        ConfigError: The text of the sources yields no vocabulary.
    """
    if not sources:
        missing = SourceConfig(path=folder.absolute() / "data.jsonl")
        return _checked(folder, [missing], _Plan(), tuple(Stage))
    views = [_view(source, scratch) for source in sources]
    described = [_described(source, view) for source, view in zip(sources, views, strict=True)]
    stages = tuple(
        stage for stage in Stage if any(view.report.serving[stage.value] for view in views)
    )
    plan = _plan(described, views, stages=stages, scratch=scratch)
    return _checked(folder, described, plan, stages)


def write_starter(folder: Path, content: Starter) -> Path:
    """Writes the configuration and returns where it lies.

    Raises:
        ConfigError: There is one already, or the folder cannot be written.
    """
    path = folder / CONFIG_NAME
    refuse_existing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror})") from error
    write_text(path, content.text)
    return path


def refuse_existing(folder: Path) -> None:
    """Makes sure that nothing would be overwritten.

    Raises:
        ConfigError: The folder has a configuration.
    """
    path = folder / CONFIG_NAME
    if path.exists():
        raise ConfigError(f"{path}: exists already: name another folder, or move it away")


def _view(source: SourceConfig, scratch: Path) -> SourceView:
    return look_at(
        limited(source, rows=LOOKED_AT),
        DataConfig(sources=(source,), chat=_MARKERS),
        tokenizer=None,
        stages=(),
        folder=scratch,
    )


def _described(source: SourceConfig, view: SourceView) -> SourceConfig:
    """A source as the configuration names it: by a path that holds in any working folder."""
    assert source.path is not None, "sources of one's own have a path"
    render = Render.CHAT if view.touching else source.render
    return source.model_copy(update={"path": source.path.absolute(), "render": render})


def _plan(
    sources: Sequence[SourceConfig],
    views: Sequence[SourceView],
    *,
    stages: Sequence[Stage],
    scratch: Path,
) -> _Plan:
    """Sizes by the rows and by a vocabulary that is trained on them as the run will."""
    vocabulary = _LEAST_VOCABULARY
    while vocabulary < 2 * max(view.characters for view in views):
        vocabulary *= 2
    few = tuple(limited(source, rows=LOOKED_AT) for source in sources)
    data = DataConfig(sources=few, chat=_MARKERS, cache_dir=scratch)
    settings = SentencePieceConfig(vocab_size=vocabulary, smaller_if_needed=True)
    tokenizer = train_sentencepiece(training_texts(data), settings, scratch / "tokenizer")
    seen = [look_at(source, data, tokenizer=tokenizer, stages=(), folder=scratch) for source in few]
    lengths = [each for view in seen for each in view.lengths]
    rows = _rows_of_stages(few, views, data)
    for stage in stages:
        if rows[list(Stage).index(stage)] < _LEAST_ROWS:
            raise DataError(
                f"{', '.join(view.name for view in views)}: "
                f"{sum(view.report.rows for view in views)} usable rows are too few to share over "
                f"{len(stages)} steps: '{stage}' would get "
                f"{rows[list(Stage).index(stage)]} of at least {_LEAST_ROWS}"
            )
    return _Plan(
        prompt_tokens=_limit([each for each in lengths if each.what == "prompt"]),
        answer_tokens=_limit([each for each in lengths if each.what != "prompt"]),
        vocabulary=vocabulary,
        rows=rows,
        is_whole=all(view.report.records < LOOKED_AT for view in views),
    )


def _rows_of_stages(
    sources: Sequence[SourceConfig], views: Sequence[SourceView], data: DataConfig
) -> tuple[int, int, int]:
    """Rows to train on that each stage gets by the split, the held-out ones left out."""
    totals = [0.0, 0.0, 0.0]
    for source, view in zip(sources, views, strict=True):
        shares = shares_of(source, data, serving=view.report.serving)
        for place, share in enumerate(shares):
            totals[place] += view.report.rows * share / sum(shares)
    sft, reward, prompts = (int(total * (1 - data.validation_share)) for total in totals)
    return sft, reward, prompts


def _limit(lengths: Sequence[Lengths]) -> int:
    """Tokens that hold nine of ten texts and the control tokens, a multiple of eight."""
    wanted = max((each.quantile(0.95) for each in lengths), default=0) + 2
    return min(_LONGEST_LIMIT, max(_SHORTEST_LIMIT, -(-wanted // 8) * 8))


def _checked(
    folder: Path, sources: Sequence[SourceConfig], plan: _Plan, stages: tuple[Stage, ...]
) -> Starter:
    """The text, read back as a run would read it."""
    text = "\n".join(_lines(folder, sources, plan, stages)) + "\n"
    build_config(RunConfig, tomllib.loads(text), source=CONFIG_NAME).check()
    return Starter(text=text, stages=stages)


def _lines(
    folder: Path, sources: Sequence[SourceConfig], plan: _Plan, stages: Sequence[Stage]
) -> Iterator[str]:
    yield "# Trains an assistant on your own data, on this machine's processor, within minutes."
    if len(stages) == len(Stage):
        yield f"#   megachat train --config {folder / CONFIG_NAME}"
    else:
        yield "# These rows cannot serve all three steps (no pairs of chosen and rejected answers,"
        yield "# or no answers, or no prompts): add a source that can, or run one step alone."
        yield f"#   megachat sft --config {folder / CONFIG_NAME}"
    yield f"#   megachat data --config {folder / CONFIG_NAME}    shows what is trained"
    yield ""
    yield "[run]"
    yield f"output = {_quoted(str(folder.absolute() / 'run'))}"
    yield f"title = {_quoted(f'Assistant from {sources[0].name}')}"
    yield "seed = 1"
    yield ""
    yield "[launch]"
    yield "processes = 1"
    yield 'device = "cpu"           # "cuda" on a machine with GPUs, one process for each'
    yield ""
    yield from _data_lines(sources, plan, cache=folder.absolute() / "cache")
    yield from _model_lines(plan)
    yield from _stage_lines(plan)


def _data_lines(sources: Sequence[SourceConfig], plan: _Plan, *, cache: Path) -> Iterator[str]:
    yield "[tokenizer.train]        # a small vocabulary from these texts"
    yield f"vocab_size = {plan.vocabulary}"
    yield "smaller_if_needed = true"
    yield ""
    yield "[data]"
    yield f"max_prompt_tokens = {plan.prompt_tokens}   # longer prompts are left out and counted"
    most = plan.prompt_tokens + plan.answer_tokens
    yield f"max_tokens = {most}          # longer answers are cut"
    yield "validation_share = 0.1"
    yield f"cache_dir = {_quoted(str(cache))}"
    yield "split = [2, 4, 4]        # shares of rows for SFT, reward model and PPO"
    yield ""
    yield "[data.chat]              # what stands before each turn of a conversation"
    yield f"system = {_quoted(_MARKERS.system)}"
    yield f"human = {_quoted(_MARKERS.human)}"
    yield f"assistant = {_quoted(_MARKERS.assistant)}"
    for source in sources:
        yield ""
        yield "[[data.sources]]         # one for each file; the format is found by itself"
        yield f"path = {_quoted(str(source.path))}"
        names = ", ".join(
            f"{name} = {_quoted(yours)}" for name, yours in source.columns.names.items()
        )
        if names:
            yield f"columns = {{{names}}}"
        else:
            yield '# columns = {prompt = "question", chosen = "answer"}   # where yours differ'
        if source.render is Render.CHAT:
            yield 'render = "chat"          # prompts are plain questions: put the markers around'
    yield ""


def _model_lines(plan: _Plan) -> Iterator[str]:
    yield "# To start from a published OPT, take out [tokenizer.train], [data.chat] and"
    yield "# [models.actor.shape], and say instead:"
    yield "#   [models.actor]"
    yield '#   model = "facebook/opt-125m"'
    yield '#   precision = "fp32"     # "bf16" on GPUs'
    yield "# with learning rates of some 1e-5 below, and limits of up to 2048 tokens above."
    yield "[models.actor]"
    yield 'precision = "fp32"'
    yield ""
    yield "[models.actor.shape]     # random weights: it learns to speak from your rows alone"
    yield "layers = 2"
    yield "hidden = 128"
    yield "heads = 2"
    yield f"max_positions = {plan.prompt_tokens + plan.answer_tokens}"
    yield ""
    yield "[models.reward]"
    yield 'model = "sft"            # starts from the supervised model'
    yield 'precision = "fp32"'
    yield ""


def _stage_lines(plan: _Plan) -> Iterator[str]:
    for name, key, stage, rate in (
        ("sft", "batch_rows", Stage.SFT, "2e-3"),
        ("reward", "batch_pairs", Stage.REWARD, "5e-4"),
    ):
        yield f"[{name}]"
        yield f"{key} = {plan.batch(stage)}"
        yield plan.length(stage, most=_SUPERVISED_STEPS)
        yield ""
        yield f"[{name}.optimizer]"
        yield f"learning_rate = {rate}"
        yield ""
    prompts = max(2, plan.batch(Stage.PROMPTS))
    yield "[rlhf]"
    yield f"batch_prompts = {prompts}"
    yield plan.length(Stage.PROMPTS, most=_PPO_STEPS)
    yield "evaluation_rows = 64"
    yield ""
    yield "[rlhf.sampling]"
    yield f"max_new_tokens = {plan.answer_tokens}"
    yield ""
    yield "[rlhf.ppo.reward]"
    yield "normalization_samples = 32"
    yield ""
    yield "[rlhf.actor_optimizer]"
    yield "learning_rate = 3e-4"
    yield ""
    yield "[rlhf.critic_optimizer]"
    yield "learning_rate = 3e-4"


def _quoted(text: str) -> str:
    """A string of TOML, whose basic strings have JSON's escapes."""
    return json.dumps(text, ensure_ascii=False, allow_nan=False)
