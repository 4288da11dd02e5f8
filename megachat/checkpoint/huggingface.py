"""The one place for HuggingFace model folders: load into any layout, save from any layout.

To load, the first rank checks the names and shapes of the whole folder and tells the others, so
that a file system sees one rank open the files and all ranks refuse a bad folder alike. Then each
weight is read once and sent to the ranks that need a part of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from megachat.checkpoint.checksums import check_file, with_digests
from megachat.checkpoint.digests import covers, model_digest
from megachat.checkpoint.draft import is_complete
from megachat.checkpoint.load import execute_load
from megachat.checkpoint.load_plan import plan_load
from megachat.checkpoint.names import (
    IGNORED,
    OUTPUT,
    SCORE,
    huggingface_names,
    huggingface_shape,
)
from megachat.checkpoint.reader import (
    CONFIG_FILE,
    SAFETENSORS_INDEX,
    StoredTensor,
    list_weights,
    read_json,
)
from megachat.checkpoint.writer import save_huggingface
from megachat.errors import CheckpointError, ConfigError
from megachat.model.config import OPT_MODELS, Head, OptConfig
from megachat.model.specs import WORD_EMBEDDING, TensorSpec, parameter_specs
from megachat.parallel.handover import on_first_rank

if TYPE_CHECKING:  # megatron-core takes seconds to import, and folders are looked at without it
    from megachat.model.opt import OptModel

__all__ = [
    "MissingHead",
    "check_folder",
    "is_complete",
    "load_huggingface",
    "load_together",
    "read_config",
    "save_huggingface",
]


class MissingHead(StrEnum):
    """What to do about a scalar head that the folder does not hold."""

    REFUSE = "refuse"
    INITIALISE = "initialise"
    """Draw it at random: a reward model that starts from a language model."""


def read_config(source: Path | str) -> OptConfig:
    """The architecture of a model folder, or of a published size by its hub name.

    Raises:
        CheckpointError: No readable config.json.
        ConfigError: It describes something else than an OPT that megachat implements.
    """
    if str(source) in OPT_MODELS:
        return OPT_MODELS[str(source)]
    path = Path(source) / CONFIG_FILE
    check_file(path.parent, path.name)
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; known sizes are {', '.join(OPT_MODELS)}")
    try:
        return OptConfig.from_huggingface(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_huggingface(
    model: "OptModel",
    folder: Path,
    *,
    missing_head: MissingHead = MissingHead.REFUSE,
    seed: int = 0,
) -> None:
    """Fills a model from a folder of safetensors or torch weight files.

    A collective call of all ranks of the layout.

    Args:
        model: This rank's shard receives its weights, in its own dtype.
        folder: config.json and the weights of the same architecture, of a language model or a
            scalar head.
        missing_head: Whether a scalar head may be absent.
        seed: Of the head's random start, where it is absent.

    Raises:
        CheckpointError: On every rank: the folder is unreadable, corrupt, incomplete, holds another
            architecture, a weight that is NaN or infinite, or an output of its own; names the file,
            the tensor and both shapes.
        ConfigError: config.json describes a variant that megachat does not implement.
        LaunchError: The disk took longer than `HANDOVER_LIMIT` for a batch of weights.
    """
    load_together((model,), folder, missing_head=missing_head, seed=seed)


def load_together(
    models: "Sequence[OptModel]",
    folder: Path,
    *,
    missing_head: MissingHead = MissingHead.REFUSE,
    seed: int = 0,
) -> str | None:
    """Fills several models with the same weights, which are read once: a policy and its reference.

    Args:
        models: Of one architecture, head and layout; dtype and padding may differ.
        folder: As in `load_huggingface`, and so is the rest.
        missing_head: As there.
        seed: As there.

    Returns:
        On the first rank, `digests.model_digest` of the folder, where all of it was read.

    Raises:
        CheckpointError: As in `load_huggingface`.
        ConfigError: As there.
        LaunchError: As there.
    """
    first = models[0]
    for model in models[1:]:
        assert model.groups is first.groups and model.head is first.head, "models of one role"
        assert model.config == first.config, "models of one architecture"
    specs = first.global_specs()

    def check() -> _Contents:
        return _check_folder(
            first.config, specs, folder, head=first.head, missing_head=missing_head
        )

    found = on_first_rank(check, task=f"checking {folder}")
    plan = plan_load(
        [spec for spec in specs if spec.name not in found.absent],
        found.stored,
        config=first.config,
        layout=first.groups.layout,
        twins=found.twins,
    )
    digests = execute_load(models, plan, folder)
    if found.absent:
        for model in models:
            model.initialise(seed, names=sorted(found.absent))
    if digests is None or not covers(digests, found.stored):
        return None
    return model_digest(found.config, digests)


def check_folder(folder: Path, *, head: Head, missing_head: MissingHead) -> None:
    """Refuses a folder that `load_huggingface` would refuse, from its headers alone.

    Raises:
        CheckpointError: As there.
        ConfigError: As there.
    """
    config = read_config(folder)
    specs = parameter_specs(config, tensor=1, head=head)
    _check_folder(config, specs, folder, head=head, missing_head=missing_head)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Contents:
    """What the first rank tells the others of a folder that is in order."""

    config: OptConfig
    """As the folder has it."""
    stored: Mapping[str, StoredTensor]
    """By canonical name."""
    absent: frozenset[str]
    """Parameters that start at random."""
    twins: Mapping[str, StoredTensor]
    """Tensors that must equal a parameter, by its name."""


def _check_folder(
    config: OptConfig,
    specs: Sequence[TensorSpec],
    folder: Path,
    *,
    head: Head,
    missing_head: MissingHead,
) -> _Contents:
    """Reads the headers of a folder and compares them with what is needed."""
    found = read_config(folder)
    _check_architecture(config, found, folder)
    check_file(folder, SAFETENSORS_INDEX)
    stored = with_digests(folder, list_weights(folder))
    absent: frozenset[str] = frozenset()
    if missing_head is MissingHead.INITIALISE and SCORE not in stored:
        absent = frozenset(spec.name for spec in specs if huggingface_names(spec) == (SCORE,))
    _check_tensors([spec for spec in specs if spec.name not in absent], stored, folder)
    twins = {}
    if head is Head.LANGUAGE_MODEL and OUTPUT in stored:
        words = next(spec for spec in specs if spec.name == WORD_EMBEDDING)
        _check_tensor(stored[OUTPUT], folder, shape=huggingface_shape(words))
        twins[words.name] = stored[OUTPUT]
    return _Contents(config=found, stored=stored, absent=absent, twins=twins)


def _check_architecture(config: OptConfig, found: OptConfig, folder: Path) -> None:
    """Compares what shapes alone do not tell (heads, place of the norms), and the rest too."""
    for name, here, there in (
        ("vocab_size", config.vocab_size, found.vocab_size),
        ("max_positions", config.max_positions, found.max_positions),
        ("hidden", config.hidden, found.hidden),
        ("ffn", config.ffn, found.ffn),
        ("layers", config.layers, found.layers),
        ("heads", config.heads, found.heads),
        ("embed_dim", config.embed_dim, found.embed_dim),
        ("layer_norm_first", config.layer_norm_first, found.layer_norm_first),
    ):
        if here != there:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: {name} is {there}, but the model to load into has {here}"
            )


def _check_tensors(
    specs: list[TensorSpec], stored: Mapping[str, StoredTensor], folder: Path
) -> None:
    """Checks that each expected tensor is there in its shape, and that nothing else is."""
    expected = {name: huggingface_shape(spec) for spec in specs for name in huggingface_names(spec)}
    missing = [name for name in expected if name not in stored]
    if missing:
        raise CheckpointError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are)"
        )
    for name, shape in expected.items():
        _check_tensor(stored[name], folder, shape=shape)
    surplus = [name for name in stored if name not in expected and name not in IGNORED]
    if surplus:
        first = stored[surplus[0]]
        raise CheckpointError(
            f"{folder / first.file}: {first.name} is no tensor of this model "
            f"({len(surplus)} such tensors): not a plain OPT checkpoint"
        )


def _check_tensor(tensor: StoredTensor, folder: Path, *, shape: tuple[int, ...]) -> None:
    """Checks what the header says of one tensor."""
    if tensor.shape != shape:
        raise CheckpointError(
            f"{folder / tensor.file}: {tensor.name} has shape {list(tensor.shape)}, but the model "
            f"needs {list(shape)}"
        )
    if not tensor.dtype.is_floating_point:
        raise CheckpointError(
            f"{folder / tensor.file}: {tensor.name} holds {tensor.dtype}: expected floating-point "
            "numbers"
        )
