"""Turns texts into a batch of prompts, for programs that have no data set."""

from collections.abc import Sequence

import torch

from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError
from megachat.records import PromptBatch


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], *, first_id: int = 0) -> PromptBatch:
    """The prompts as a global batch, which every rank makes alike.

    Args:
        tokenizer: Of the model that answers; where it begins sequences with a token, so do these.
        texts: The prompts, role markers included, e.g. `<human> how are you ?<bot>`.
        first_id: Number of the first one; the others count on. The answer to a prompt is drawn
            from its number and the iteration.

    Raises:
        DataError: There is no text, or one has no token.
    """
    if not texts:
        raise DataError("prompts: there are none: give at least one text")
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    rows = [begin + ids for ids in tokenizer.encode_batch(texts)]
    empty = [number for number, row in enumerate(rows) if not row]
    if empty:
        raise DataError(f"prompts: text {empty[0]} has no token ({len(empty)} such texts)")
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), tokenizer.pad_id)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
    ids = torch.arange(first_id, first_id + len(rows))
    return PromptBatch(tokens=tokens, lengths=lengths, ids=ids)
