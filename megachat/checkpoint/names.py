"""The one place for how HuggingFace names and arranges the tensors of an OPT model (pure)."""

from torch import Tensor

from megachat.model.specs import TensorSpec

SCORE = "score.weight"
"""The scalar head of `OPTForSequenceClassification`."""

OUTPUT = "lm_head.weight"
"""What a language model's output is called where it is stored beside the embedding."""

IGNORED = frozenset({OUTPUT, SCORE, "model.decoder.version"})
"""Names a file may hold that a model may not need: the tied output, another head, a format mark."""

_PREFIX = "model."
"""What the model classes with a head put before every name of the decoder."""

_OUTSIDE_LAYERS = {
    "embedding.word.weight": "model.decoder.embed_tokens.weight",
    "embedding.position.weight": "model.decoder.embed_positions.weight",
    "embedding.project_in.weight": "model.decoder.project_in.weight",
    "final_norm.weight": "model.decoder.final_layer_norm.weight",
    "final_norm.bias": "model.decoder.final_layer_norm.bias",
    "head.project_out.weight": "model.decoder.project_out.weight",
    "head.score.weight": SCORE,
}

_IN_LAYER = {
    "norm1": ("self_attn_layer_norm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "proj": ("self_attn.out_proj",),
    "norm2": ("final_layer_norm",),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
}


def huggingface_names(spec: TensorSpec) -> tuple[str, ...]:
    """The tensors that hold a parameter: query, key and value for a fused one, else one."""
    if spec.layer is None:
        return (_OUTSIDE_LAYERS[spec.name],)
    part, kind = spec.name.removeprefix(f"layers.{spec.layer}.").split(".")
    return tuple(f"model.decoder.layers.{spec.layer}.{module}.{kind}" for module in _IN_LAYER[part])


def huggingface_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Shape of each of those tensors: without padding, a third of the rows for a fused one."""
    rows, *rest = spec.unpadded_shape
    return (rows // len(huggingface_names(spec)), *rest)


def canonical_name(name: str) -> str:
    """Puts the prefix before names of files that were saved without it (`decoder.layers.0...`)."""
    return _PREFIX + name if name.startswith("decoder.") else name


def place_part(fused: Tensor, part: Tensor, *, number: int, parts: int, head_dim: int) -> None:
    """Puts query, key or value `[heads x head_dim, ...]` into the rows of a fused parameter.

    Those go by head, and within a head query, key, value.

    Args:
        fused: `[parts x heads x head_dim, ...]`, contiguous; its other rows stay.
        part: One of its parts, in any dtype.
        number: Which one, from 0.
        parts: How many there are.
        head_dim: Rows of a head in one part.
    """
    by_head = fused.view(-1, parts, head_dim, *fused.shape[1:])
    by_head[:, number].copy_(part.view(-1, head_dim, *part.shape[1:]))


def take_part(fused: Tensor, *, number: int, parts: int, head_dim: int) -> Tensor:
    """What `place_part` put into a fused parameter."""
    by_head = fused.view(-1, parts, head_dim, *fused.shape[1:])
    return by_head[:, number].flatten(0, 1)
