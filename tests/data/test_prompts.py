import pytest

from megachat.data.prompts import encode_prompts
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError


def test_prompts_are_padded_to_the_right_and_numbered(tokenizer: Tokenizer) -> None:
    texts = ["<human> do you like the rain ?<bot>", "<human> ?<bot>"]
    batch = encode_prompts(tokenizer, texts, first_id=5)
    assert batch.ids.tolist() == [5, 6]
    for row, length, text in zip(batch.tokens, batch.lengths.tolist(), texts, strict=True):
        assert row[:length].tolist() == tokenizer.encode(text)
        assert set(row[length:].tolist()) <= {tokenizer.pad_id}


def test_a_batch_without_prompts_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="there are none"):
        encode_prompts(tokenizer, [])
    with pytest.raises(DataError, match="text 1 has no token"):
        encode_prompts(tokenizer, ["a", ""])


def test_prompts_begin_as_the_tokenizer_begins_sequences(opt_like: Tokenizer) -> None:
    batch = encode_prompts(opt_like, ["hello"])
    assert batch.tokens[0].tolist() == [opt_like.bos_id, *opt_like.encode("hello")]
