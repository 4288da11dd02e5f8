"""Talks to tokenizer libraries: loads, saves and trains tokenizers.

Everything else sees token ids. Two rules hold for every tokenizer that comes through here:

* the padding id differs from the end-of-sequence id, so that an end can be trained (OPT: `<pad>` 1
  and `</s>` 2). Nothing is ever patched to `pad = eos`;
* control tokens in *text* are text: a prompt that contains the characters `</s>` never becomes an
  end of sequence. Role markers such as `<human>` are ordinary vocabulary and are recognised.
"""

import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, Self

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megachat.data.chat import ChatConfig, chat_template
from megachat.data.config import SentencePieceConfig, Whitespace
from megachat.data.messages import first_line
from megachat.errors import CheckpointError, ConfigError, DataError
from megachat.hub import Content, local_folder

SENTENCEPIECE_FILE = "sentencepiece.model"
"""Name of the sentencepiece model that is kept beside a tokenizer trained here."""

_SOURCE_PLACE = re.compile(r"^\w+: \S+\(\d+\) (\[.*?\] )?")
"""Where in its sources the trainer complains, which helps nobody here."""

_NORMALISATION = {Whitespace.KEEP: "identity", Whitespace.FOLD: "nmt_nfkc"}
"""Names of sentencepiece's rules."""
_KEPT_CHARACTERS = "\n\r\t"
"""What has a piece of its own where white space is kept, however rare it is in the text."""

_SCORE_STEPS = 256.0
"""Piece scores are rounded to multiples of 1/256, see `_round_scores`."""


class Tokenizer:
    """A Hugging Face fast tokenizer with explicit control ids.

    Attributes:
        bos_id: Beginning of sequence; the end of sequence where the tokenizer has none.
        eos_id: End of sequence: the one token that ends an answer in every stage.
        pad_id: Fills the right of short rows, never an end.
        adds_bos: Whether sequences start with `bos_id` (True for OPT).
    """

    def __init__(self, library: Any, *, origin: str) -> None:
        """Wraps a fast tokenizer of the transformers library.

        Args:
            library: A `transformers.PreTrainedTokenizerFast`.
            origin: Folder or name it came from, for messages.

        Raises:
            DataError: It is not a fast tokenizer, has no end or padding token, or pads with its
                end-of-sequence token.
        """
        if not isinstance(library, PreTrainedTokenizerFast):
            raise DataError(
                f"tokenizer {origin}: {type(library).__name__} is not a fast tokenizer: save it "
                "with a tokenizer.json"
            )
        if library.eos_token_id is None:
            raise DataError(f"tokenizer {origin}: has no eos_token: add one to its configuration")
        if library.pad_token_id is None or library.pad_token_id == library.eos_token_id:
            raise DataError(
                f"tokenizer {origin}: pad id {library.pad_token_id} must exist and differ from eos "
                f"id {library.eos_token_id}, or ends could not be trained: give it a pad_token of "
                "its own (OPT has <pad> = 1)"
            )
        self._library = library
        self._backend: Any = library.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        probe = self._backend.encode("", add_special_tokens=True).ids
        self._backend.encode_special_tokens = True  # control tokens in text are text
        self.origin = origin
        self.eos_id: int = library.eos_token_id
        self.pad_id: int = library.pad_token_id
        bos = library.bos_token_id
        self.bos_id: int = self.eos_id if bos is None else bos
        self.adds_bos: bool = bos is not None and probe[:1] == [bos]

    @classmethod
    def load(cls, folder_or_name: str | Path) -> Self:
        """Loads a tokenizer folder, or a hub name from the hub's cache; asks no network.

        Args:
            folder_or_name: A folder that `transformers.AutoTokenizer` loads, or a hub name such as
                `facebook/opt-125m`.

        Raises:
            CheckpointError: There is no such folder, and the name is not cached.
            DataError: The tokenizer breaks a rule of this module.
        """
        folder = local_folder(str(folder_or_name), Content.TOKENIZER)
        return cls(_load_folder(folder), origin=str(folder))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; the embedding of a model may have more rows."""
        return len(self._library)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids of a text."""
        state = f"{self._backend.to_str()}|{self.bos_id}|{self.eos_id}|{self.pad_id}"
        return hashlib.sha256(f"{state}|{self.adds_bos}".encode()).hexdigest()[:32]

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the control tokens (padding, ends, unknown), ascending."""
        return tuple(sorted(set(self._library.all_special_ids)))

    def token_id(self, token: str) -> int:
        """The id of one vocabulary entry such as `<human>`.

        Raises:
            DataError: There is no such entry.
        """
        found: int | None = self._backend.token_to_id(token)
        if found is None:
            raise DataError(f"tokenizer {self.origin}: has no token {token!r}")
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without beginning or end of sequence."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, without beginning or end of sequence."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [item.ids for item in encoded]

    def decode(self, ids: Sequence[int], *, skip_specials: bool = True) -> str:
        """The text of some ids; control tokens are left out unless asked for."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_specials)
        return text

    def save(self, folder: Path, *, chat: ChatConfig | None = None) -> None:
        """Writes a folder that `Tokenizer.load` and `transformers.AutoTokenizer` load.

        The loaded copy gives equal ids. A sentencepiece model that stood beside the loaded
        tokenizer is copied too.

        Args:
            folder: Where to save; a file there is replaced when its successor is complete.
            chat: Of the chat template that the folder carries from now on; None keeps the one that
                the tokenizer came with.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        if chat is not None:
            self._library.chat_template = chat_template(chat, adds_bos=self.adds_bos)
        beside = Path(self.origin) / SENTENCEPIECE_FILE

        def write(draft: Path) -> None:
            self._library.save_pretrained(draft, save_jinja_files=False)
            if beside.is_file() and beside.parent.resolve() != folder.resolve():
                shutil.copyfile(beside, draft / SENTENCEPIECE_FILE)

        _write_folder(folder, write)


def train_sentencepiece(
    texts: Iterable[str], config: SentencePieceConfig, folder: Path
) -> Tokenizer:
    """Trains a sentencepiece unigram vocabulary and saves it as a fast tokenizer.

    Texts are streamed; one thread and a sample that depends on the seed alone make the result a
    function of the texts. As in OPT's own vocabulary a word carries its leading space, and no space
    is put in front of a text: ` hello` and `hello` are different. `decode(encode(text))` gives the
    text back where white space is kept and all its characters have pieces, else normalised text.

    Args:
        texts: Training texts, markers included.
        config: Size and control tokens.
        folder: Where to save; loadable by `Tokenizer.load` and `transformers.AutoTokenizer`. The
            sentencepiece model is kept beside as `sentencepiece.model`.

    Raises:
        DataError: There is no text.
        ConfigError: The vocabulary does not fit the text, e.g. it asks for too many pieces.
        CheckpointError: The folder cannot be written.
    """
    proto = _train_unigram(texts, config)
    _round_scores(proto)
    library = PreTrainedTokenizerFast(
        tokenizer_object=_to_fast(proto, config),
        bos_token=config.bos_token,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )

    def write(draft: Path) -> None:
        library.save_pretrained(draft)
        (draft / SENTENCEPIECE_FILE).write_bytes(proto.SerializeToString())

    _write_folder(folder, write)
    return Tokenizer.load(folder)


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a folder beside its place, and moves the files when all of them are complete.

    Raises:
        CheckpointError: The disk does not take them; the folder is as it was.
    """
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.draft")
    try:
        draft.mkdir(parents=True)
        write(draft)
        folder.mkdir(exist_ok=True)
        for path in sorted(draft.iterdir()):
            os.replace(path, folder / path.name)
    except Exception as error:  # the library's own writer raises plain ones
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be written ({first_line(error)}): make room there, or "
            "choose another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _load_folder(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises many types for a damaged folder
        raise CheckpointError(
            f"tokenizer {folder}: cannot be loaded ({first_line(error)}): it must hold "
            "tokenizer.json or the vocabulary files, and tokenizer_config.json"
        ) from error


def _train_unigram(texts: Iterable[str], config: SentencePieceConfig) -> Any:
    """Runs the sentencepiece trainer; returns its model as a protocol buffer."""
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for text in texts:
            count += 1
            yield text

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(counted(), config)),
            model_writer=written,
            model_type="unigram",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            user_defined_symbols=list(config.user_defined_symbols),
            max_sentence_length=config.max_sentence_bytes,
            num_threads=1,
            normalization_rule_name=_NORMALISATION[config.whitespace],
            required_chars=_KEPT_CHARACTERS if config.whitespace is Whitespace.KEEP else "",
            hard_vocab_limit=not config.smaller_if_needed,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if not count:
            raise DataError("tokenizer training: there is no text to train on") from error
        reason = _SOURCE_PLACE.sub("", first_line(error))
        hint = " (or set tokenizer.train.smaller_if_needed = true)" if "too high" in reason else ""
        raise ConfigError(
            f"tokenizer training: tokenizer.train.vocab_size {config.vocab_size} on {count} texts "
            f"failed: {reason}{hint}"
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(written.getvalue())
    return proto


def _sample(texts: Iterable[str], config: SentencePieceConfig) -> list[str]:
    """At most `max_sentences` of the texts, each as likely as any other (a reservoir).

    The trainer could sample for itself, but draws otherwise in every process, whatever its seed.
    """
    random, chosen = Random(config.seed), list[str]()
    for index, text in enumerate(texts):
        if len(chosen) < config.max_sentences:
            chosen.append(text)
        elif (place := random.randrange(index + 1)) < config.max_sentences:
            chosen[place] = text
    return chosen


def _round_scores(proto: Any) -> None:
    """Rounds piece scores so that every sum of a text is exact in float32 and in float64.

    Repeated letters have segmentations of equal score (`ha|haha`, `haha|ha`). sentencepiece adds in
    float32 and the fast tokenizer in float64, so rounding errors would decide differently between
    them. With exact sums both take the same one.
    """
    for piece in proto.pieces:
        piece.score = round(piece.score * _SCORE_STEPS) / _SCORE_STEPS


def _to_fast(proto: Any, config: SentencePieceConfig) -> Any:
    """The fast tokenizer with the vocabulary, normalisation and segmentation of `proto`."""
    control = ["<s>", "<pad>", "</s>", "<unk>"]
    fast = tokenizers.Tokenizer(
        models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=3)
    )
    if proto.normalizer_spec.precompiled_charsmap:
        fast.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    in_text = "|".join(token[1:] for token in control)
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # The characters of a control token never meet in one pre-token, so the model cannot
            # match them against the vocabulary entry of that token.
            pre_tokenizers.Split(tokenizers.Regex(f"<(?={in_text})"), behavior="isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True),
        ]
    )
    fast.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="never")
    fast.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in control]
    )
    fast.add_tokens(
        [
            tokenizers.AddedToken(symbol, special=False, normalized=False)
            for symbol in config.user_defined_symbols
        ]
    )
    if config.add_bos:
        bos = config.bos_token
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, fast.token_to_id(bos))]
        )
    return fast
