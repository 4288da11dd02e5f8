"""The one place for bytes that live for part of a phase: activations and workspace.

With U = one hidden state of a micro-batch (`value_bytes x rows x tokens x hidden`) and F = one
rank's MLP activation (`value_bytes x rows x tokens x ffn / tp`), a layer keeps for its backward
pass 4 U (inputs and outputs of its two norms), 4 U / tp (queries, keys, values, attended values), F
(the input of the second MLP product) and 4 bytes per row, token and local head (the logarithms
that flash attention keeps). Sequence parallelism divides the 4 U by tp. Full recomputation keeps
one U per layer and needs one layer's share while it recomputes it.

These counts, and those of the workspace, were derived from the code and compared by hand with a dry
run of the production classes; what `tools/dry_run.py` checks are the long-lived pools. Attention is
taken to be a flash kernel, which keeps no `[tokens, tokens]` matrix; dropout is taken to be 0.
"""

from dataclasses import dataclass

from megachat.model.config import Head, Recompute
from megachat.planner.allocator import rounding, workspace_rounding
from megachat.planner.job import Job, RoleSetup
from megachat.planner.pools import GRADIENT_BYTES
from megachat.planner.sizes import mlp_elements, stage_elements, stage_tensors, word_elements

_STAGED_BYTES = 2**28
"""`training.gradients._STAGED_BYTES`, above which no reduction is started before another ends."""

_BUFFER_ELEMENTS = 2**24
"""`training.buffers.BUFFER_ELEMENTS`, from which on a buffer of gradients takes no more tensors."""

_LOSS_CHUNK_ELEMENTS = 2**20
"""`ops.token_logprobs.CHUNK_ELEMENTS`, the largest fp32 temporary of the log-probabilities."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transients:
    """What a phase needs beside the long-lived pools."""

    activations: int
    """Bytes kept for backward passes of all micro-batches in flight."""
    workspace: int
    """Bytes on top, at the moment when both together are largest."""
    rounding: int
    """Bytes that torch's caching allocator takes beyond both."""

    @property
    def total(self) -> int:
        """Activations and workspace."""
        return self.activations + self.workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class _Units:
    """Bytes of the building blocks of one micro-batch on one stage."""

    hidden: int
    """U."""
    shard: int
    """U, cut along the sequence where sequence parallel."""
    mlp: int
    """F."""
    embed: int
    """As U with the width of the embedding."""
    logits: int
    """One rank's logits."""
    loss_chunks: int
    """fp32 temporaries of the log-probabilities."""
    layer: int
    """What a layer keeps, without recomputation."""
    gather: int
    """Buffer that holds a gathered hidden state under sequence parallelism."""
    layer_tensors: tuple[int, ...]
    """The same as `layer`, one by one."""


def training_transients(
    setup: RoleSetup, *, stage: int, rows: int, tokens: int, num_micro_batches: int
) -> Transients:
    """Of a forward and backward pass by one-forward-one-backward over the pipeline.

    Args:
        setup: The model and how it runs.
        stage: Pipeline stage of the rank.
        rows: Rows of a micro-batch.
        tokens: Padded length of the rows.
        num_micro_batches: Micro-batches of each data rank.
    """
    units = _units(setup, rows=rows, tokens=tokens)
    layout = setup.layout
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    in_flight = min(num_micro_batches, layout.pipeline - stage)
    num_layers = setup.config.layers // layout.pipeline
    recomputes = setup.recompute is Recompute.FULL
    kept = num_layers * (units.shard if recomputes else units.layer)
    kept += _kept_by_embedding(setup, units) if is_first else 0
    edge = _kept_by_head(setup, units) if is_last else 0
    # The input of the micro-batch before, until this one's replaces it.
    carried = units.shard if stage > 0 and num_micro_batches > in_flight else 0
    held = in_flight * kept + carried
    moments = [
        # The end of the last forward pass: product, sum with the bias, residual sum.
        in_flight * kept + edge + 3 * units.shard + units.gather,
        held + _layer_backward(setup, units, is_first=is_first, is_last=is_last),
    ]
    if is_last and setup.head is Head.LANGUAGE_MODEL:
        # The gradient of the logits, and fp32 chunks of it under construction.
        moments.append(held + edge + units.logits + units.loss_chunks + units.gather)
        moments.append(held + _head_backward(setup, units, is_tied_here=is_first))
    if is_first:
        moments.append((in_flight - 1) * kept + _embedding_backward(setup, units))
    activations = in_flight * kept + edge
    tensors = (units.shard,) if recomputes else units.layer_tensors
    return Transients(
        activations=activations,
        workspace=max(moments) - activations,
        rounding=in_flight * num_layers * rounding(tensors) + workspace_rounding(),
    )


def _layer_backward(setup: RoleSetup, units: _Units, *, is_first: bool, is_last: bool) -> int:
    """The backward pass of a stage's last layer, beside what the layers keep."""
    # The gradient of the MLP's activation, and then a matrix's in bf16 and fp32 or, if larger, the
    # one before the rectifier.
    matrix = 3 * setup.value_bytes * mlp_elements(setup)
    total = units.hidden + units.mlp + max(matrix, units.mlp)
    if setup.recompute is Recompute.FULL:
        total += units.layer
    if units.gather:  # the gathered gradient is in the buffer, beside its shard
        total += units.shard
    if is_last and not setup.config.layer_norm_first:  # the last norm is done, its input gone
        total -= units.shard
    if is_first and is_last and setup.head is Head.LANGUAGE_MODEL:
        # The head's part of the gradient of the words waits for the embedding's.
        total += setup.value_bytes * word_elements(setup)
    return total


def _head_backward(setup: RoleSetup, units: _Units, *, is_tied_here: bool) -> int:
    """The backward pass of the head: gradients of words and hidden state."""
    words = setup.value_bytes * word_elements(setup)
    normed = units.shard if setup.config.layer_norm_first else 0
    if is_tied_here:
        return normed + units.embed + units.logits + words + units.hidden + units.gather
    return normed + 3 * words + units.hidden + units.gather  # of the words in bf16 and in fp32


def _embedding_backward(setup: RoleSetup, units: _Units) -> int:
    """The end of a backward pass: the gradient of the words in bf16 and in fp32."""
    words = 3 * setup.value_bytes * word_elements(setup)
    if setup.layout.pipeline == 1 and setup.head is Head.LANGUAGE_MODEL:
        return words + units.gather
    gradient = units.embed if setup.config.has_projection else units.hidden
    return words + gradient + (units.shard if units.gather else 0)


def reduction_staging(setup: RoleSetup, *, stage: int) -> int:
    """Most bytes of gradients that a data rank has from others, not added yet, with gloo.

    What was started before is at most `_STAGED_BYTES`; the buffer that follows comes on top. NCCL
    reduces in place, without any.
    """
    tensors = stage_tensors(setup, stage=stage)
    largest = _BUFFER_ELEMENTS + max((*tensors.layer, *tensors.edges))
    whole = stage_elements(setup, stage=stage).total
    others = setup.layout.data - 1
    received, of_the_last = (
        GRADIENT_BYTES * others * -(-elements // setup.layout.data) for elements in (whole, largest)
    )
    return min(received, _STAGED_BYTES + of_the_last)


def scoring_transients(setup: RoleSetup, *, stage: int, rows: int, tokens: int) -> Transients:
    """Of forward passes without gradients; micro-batches leave nothing behind."""
    units = _units(setup, rows=rows, tokens=tokens)
    is_first, is_last = stage == 0, stage == setup.layout.pipeline - 1
    workspace = 2 * units.mlp + 4 * units.shard + units.gather
    workspace += 3 * units.shard if units.gather else 0
    if not is_last:  # what is on its way to the next stage
        workspace += 2 * units.shard + (units.hidden if is_first else 0)
    if is_last and setup.head is Head.LANGUAGE_MODEL:
        workspace += units.logits + units.loss_chunks
        workspace += units.hidden + 3 * units.shard if units.gather else 0
    return Transients(activations=0, workspace=workspace, rounding=workspace_rounding())


def generation_workspace(job: Job) -> int:
    """Bytes of one step of generation: decode rows and a chunk of prompts together."""
    config, tensor, value = job.actor.config, job.generation_tensor, job.actor.value_bytes
    tokens = job.prefill_tokens + job.most_at_once
    # The hidden state, its norm, a product and the product with its bias; and the MLP's activation,
    # or queries, keys, values, queries apart, and what attention makes of them.
    per_token = value * (4 * config.hidden + max(config.ffn, 6 * config.hidden) // tensor)
    rows = job.most_at_once + -(-job.prefill_tokens // job.workload.prompt_tokens)
    # Logits, and the fp32 copies that the sampler makes of them.
    logits = rows * job.actor.padded_vocab // tensor * (value + 3 * 4)
    return tokens * per_token + logits


def _units(setup: RoleSetup, *, rows: int, tokens: int) -> _Units:
    config, tensor, value = setup.config, setup.layout.tensor, setup.value_bytes
    positions = rows * tokens
    hidden = value * positions * config.hidden
    shard = hidden // tensor if setup.is_sequence_parallel else hidden
    mlp = value * positions * config.ffn // tensor
    columns = setup.padded_vocab // tensor
    # Four norms' inputs and outputs; queries, keys and values together; attended values; the
    # MLP's; logarithms.
    statistics = 4 * positions * config.heads // tensor
    layer_tensors = (*[shard] * 4, 3 * hidden // tensor, hidden // tensor, mlp, statistics)
    return _Units(
        hidden=hidden,
        shard=shard,
        mlp=mlp,
        embed=value * positions * config.embed_dim,
        logits=value * positions * columns,
        loss_chunks=_loss_chunks(positions, columns),
        layer=sum(layer_tensors),
        layer_tensors=layer_tensors,
        gather=hidden if setup.is_sequence_parallel else 0,
    )


def _loss_chunks(positions: int, columns: int) -> int:
    """Two temporaries of a chunk of tokens, and one of the chunk before where there are several."""
    rows = max(1, _LOSS_CHUNK_ELEMENTS // columns)
    return 4 * columns * (3 * rows if positions > rows else 2 * positions)


def _kept_by_embedding(setup: RoleSetup, units: _Units) -> int:
    """What a micro-batch keeps of the first stage's embedding."""
    projected = units.embed if setup.config.has_projection else 0
    # The sequence shard that enters the first layer is a view of the whole hidden state.
    return projected + units.hidden - units.shard


def _kept_by_head(setup: RoleSetup, units: _Units) -> int:
    """What a micro-batch keeps of the last stage's norm, projection and head."""
    projected = units.shard if setup.config.has_projection else 0
    normed = units.shard if setup.config.layer_norm_first else 0
    if setup.head is Head.LANGUAGE_MODEL:
        return projected + normed + units.embed + units.logits
    copy = 4 * units.embed // setup.value_bytes * units.shard // units.hidden
    return projected + normed + copy
