import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megachat.data import tokenizer as module
from megachat.data.chat import ChatConfig
from megachat.data.config import SentencePieceConfig
from megachat.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from megachat.errors import CheckpointError, ConfigError, DataError
from megachat.hub import Content, fetch
from tests.data.samples import corpus, sentence, train_tiny
from tests.harness import fake_hub, run_ranks

OPT_FILES = Path(__file__).resolve().parents[3] / "shared" / "data" / "opt_tokenizer"


def opt_folder(target: Path) -> Path:
    """The files of the published OPT tokenizer with its published settings."""
    if not OPT_FILES.is_dir():
        pytest.skip("OPT's vocabulary does not lie beside this checkout (../shared/data)")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(OPT_FILES / name, target / name)
    settings_ = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "add_prefix_space": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings_))
    return target


def save_with(tokenizer: Tokenizer, folder: Path, **specials: str) -> Path:
    """A copy of a tokenizer with other control tokens."""
    library = AutoTokenizer.from_pretrained(tokenizer.origin)
    changed = PreTrainedTokenizerFast(tokenizer_object=library.backend_tokenizer, **specials)
    changed.save_pretrained(folder)
    return folder


def test_control_ids_are_those_of_opt(tokenizer: Tokenizer) -> None:
    ids = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id)
    assert ids == (0, 1, 2)
    assert tokenizer.vocab_size == 56
    assert not tokenizer.adds_bos
    assert (tokenizer.token_id("<human>"), tokenizer.token_id("<bot>")) == (4, 5)
    assert tokenizer.special_ids == (0, 1, 2, 3)


def test_markers_are_one_token_and_words_bring_their_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<human> rain<bot> sun")
    assert ids == [4, *tokenizer.encode(" rain"), 5, *tokenizer.encode(" sun")]
    assert tokenizer.decode(ids) == "<human> rain<bot> sun"


def test_ids_equal_those_of_sentencepiece(tokenizer: Tokenizer) -> None:
    oracle = sentencepiece.SentencePieceProcessor(
        model_file=str(Path(tokenizer.origin) / SENTENCEPIECE_FILE)
    )
    texts = [*corpus(), *(sentence(number, words=9) for number in range(0, 9000, 3))]
    assert tokenizer.encode_batch(texts) == oracle.encode(texts)


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet="aeinorst <>/ \u00e9\u2026!?\ufb01", max_size=40))
def test_ids_equal_those_of_sentencepiece_on_odd_text(tokenizer: Tokenizer, text: str) -> None:
    oracle = sentencepiece.SentencePieceProcessor(
        model_file=str(Path(tokenizer.origin) / SENTENCEPIECE_FILE)
    )
    ids = tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids)
    assume("<s>" not in text and "</s>" not in text)  # cut in pieces, see the next but one test
    assert ids == oracle.encode(text)


def test_repeated_letters_are_cut_as_sentencepiece_cuts_them(tmp_path: Path) -> None:
    """Equal scores: only exact sums make float32 and float64 choose the same segmentation."""
    texts = [f" {'ha' * (number % 9 + 1)} {'o' * (number % 11 + 1)}" for number in range(400)]
    trained = module.train_sentencepiece(texts, SentencePieceConfig(vocab_size=24), tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / SENTENCEPIECE_FILE))
    assert trained.encode_batch(texts) == oracle.encode(texts)


def _fingerprint_of_a_sample(folder: Path, seed: int) -> str:
    texts = [f" {number % 97} and {number % 89}" for number in range(3000)]
    config = SentencePieceConfig(vocab_size=40, max_sentences=300, seed=seed)
    return module.train_sentencepiece(texts, config, folder / str(os.getpid())).fingerprint


def test_every_process_draws_the_same_sample_of_the_texts(tmp_path: Path) -> None:
    """sentencepiece's own sampling does not, and a run would differ from its repetition."""
    first, second = run_ranks(2, _fingerprint_of_a_sample, tmp_path, 5)
    assert first == second != run_ranks(1, _fingerprint_of_a_sample, tmp_path, 6)[0]


@pytest.mark.parametrize("control", ["<s>", "<pad>", "</s>", "<unk>"])
def test_control_tokens_in_text_stay_text(tokenizer: Tokenizer, control: str) -> None:
    ids = tokenizer.encode(f"sun {control} rain")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.encode_batch([f"sun {control} rain"]) == [ids]


def test_training_twice_gives_the_same_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tiny(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    model = Path(tokenizer.origin) / SENTENCEPIECE_FILE
    assert (tmp_path / SENTENCEPIECE_FILE).read_bytes() == model.read_bytes()


def test_saved_tokenizer_loads_with_equal_ids(opt_like: Tokenizer, tmp_path: Path) -> None:
    opt_like.save(tmp_path / "copy")
    loaded = Tokenizer.load(tmp_path / "copy")
    texts = list(corpus())[:50]
    assert loaded.encode_batch(texts) == opt_like.encode_batch(texts)
    assert loaded.fingerprint == opt_like.fingerprint
    assert (loaded.adds_bos, loaded.bos_id) == (True, 2)
    assert (tmp_path / "copy" / SENTENCEPIECE_FILE).is_file()


def test_saved_tokenizer_loads_with_the_transformers_library(
    opt_like: Tokenizer, tmp_path: Path
) -> None:
    opt_like.save(tmp_path)
    library = AutoTokenizer.from_pretrained(str(tmp_path))
    assert library(" sun rain").input_ids == [2, *opt_like.encode(" sun rain")]
    assert (library.pad_token_id, library.eos_token_id) == (1, 2)


def test_decode_can_show_control_tokens(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(" sun"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == " sun"
    assert tokenizer.decode(ids, skip_specials=False) == " sun</s>"


def test_pad_equal_to_eos_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The flaw behind complaint 14: ends that look like padding are never trained."""
    folder = save_with(tokenizer, tmp_path, eos_token="</s>", pad_token="</s>", bos_token="<s>")
    with pytest.raises(DataError, match="pad id 2 must exist and differ from eos id 2"):
        Tokenizer.load(folder)


def test_missing_pad_or_eos_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    no_pad = save_with(tokenizer, tmp_path / "pad", eos_token="</s>")
    with pytest.raises(DataError, match="pad id None must exist"):
        Tokenizer.load(no_pad)
    no_eos = save_with(tokenizer, tmp_path / "eos", pad_token="<pad>")
    with pytest.raises(DataError, match="has no eos_token"):
        Tokenizer.load(no_eos)


def test_bos_falls_back_to_eos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_with(tokenizer, tmp_path, eos_token="</s>", pad_token="<pad>")
    loaded = Tokenizer.load(folder)
    assert (loaded.bos_id, loaded.adds_bos) == (2, False)


def test_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        Tokenizer.load(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_a_name_that_is_not_cached_is_one_line_and_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_hub.serve() as hub:
        fake_hub.use(hub, tmp_path, monkeypatch)
        with pytest.raises(CheckpointError, match="not in the local cache.*megachat fetch") as e:
            Tokenizer.load("nobody/no-such-model")
        assert hub.requests == [] and "\n" not in str(e.value)


def test_a_name_in_the_hubs_cache_is_loaded_from_there(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path / "saved")
    with fake_hub.serve() as hub:
        fake_hub.use(hub, tmp_path / "cache", monkeypatch)
        hub.repositories["models/nobody/tiny"] = fake_hub.files_of(tmp_path / "saved")
        fetch("nobody/tiny", Content.TOKENIZER)
    assert Tokenizer.load("nobody/tiny").fingerprint == tokenizer.fingerprint


def test_damaged_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"must hold tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="has no token '<nobody>'"):
        tokenizer.token_id("<nobody>")


def test_training_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        module.train_sentencepiece([], SentencePieceConfig(), tmp_path)


def test_vocabulary_larger_than_the_text_allows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size 4096 on 1 texts failed"):
        module.train_sentencepiece(["one line"], SentencePieceConfig(), tmp_path)


def test_published_opt_vocabulary_gives_the_published_ids(tmp_path: Path) -> None:
    opt = Tokenizer.load(opt_folder(tmp_path))
    assert opt.adds_bos
    ids = [opt.bos_id, *opt.encode("Hello my name is")]
    assert ids == [2, 31414, 127, 766, 16]
    assert (opt.bos_id, opt.pad_id, opt.eos_id, opt.vocab_size) == (2, 1, 2, 50265)
    assert not {1, 2} & set(opt.encode("a </s> b <pad>"))


def test_published_opt_vocabulary_survives_saving(tmp_path: Path) -> None:
    (tmp_path / "opt").mkdir()
    opt = Tokenizer.load(opt_folder(tmp_path / "opt"))
    opt.save(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert again.adds_bos
    assert again.encode(" Human: hi Assistant:") == opt.encode(" Human: hi Assistant:")


WHITE = st.text(alphabet="\n\t\r aeinorst:\u00e9", max_size=40)


@settings(deadline=None, max_examples=150)
@given(text=WHITE)
def test_kept_white_space_comes_back(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\u00e9", "")  # has no piece here
    assert tokenizer.decode(tokenizer.encode(text)) == text
    oracle = sentencepiece.SentencePieceProcessor(
        model_file=str(Path(tokenizer.origin) / SENTENCEPIECE_FILE)
    )
    assert tokenizer.encode(text) == oracle.encode(text)


def test_line_breaks_of_markers_are_kept_by_default(tokenizer: Tokenizer) -> None:
    text = "\n\nHuman: sun\n\nAssistant: rain"
    kept = tokenizer.decode(tokenizer.encode(text))
    assert kept.count("\n\n") == 2


def test_folding_gives_the_vocabulary_of_before(tmp_path: Path) -> None:
    """What the first command's example asks for; the hash is of the code before white space was
    kept (commit 8923252)."""
    folded = train_tiny(tmp_path, whitespace="fold")
    assert folded.fingerprint == "22785fdfaaad5616e1e8b6c5382381a7"
    assert folded.encode(" sun\n\nrain") == folded.encode(" sun  rain")


def test_text_too_small_for_the_vocabulary_says_what_to_do_or_gives_less(tmp_path: Path) -> None:
    texts = [f" {sentence(number)}" for number in range(30)]
    config = SentencePieceConfig(vocab_size=4000)
    with pytest.raises(ConfigError, match="vocab_size 4000 on 30 texts .* too high") as caught:
        module.train_sentencepiece(texts, config, tmp_path / "a")
    assert "smaller_if_needed" in str(caught.value) and "\n" not in str(caught.value)
    smaller = config.model_copy(update={"smaller_if_needed": True})
    made = module.train_sentencepiece(texts, smaller, tmp_path / "b")
    assert made.vocab_size < 400
    assert made.decode(made.encode(texts[0])) == texts[0]


def test_a_vocabulary_that_is_reached_is_the_same_with_or_without_leave(tmp_path: Path) -> None:
    strict, lenient = train_tiny(tmp_path / "a"), train_tiny(tmp_path / "b", smaller_if_needed=True)
    assert strict.fingerprint == lenient.fingerprint


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses longer files, as it refuses any where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [0, 700, 4000])
def test_a_disk_without_room_leaves_the_folder_as_it_was(
    tokenizer: Tokenizer, tmp_path: Path, num_bytes: int
) -> None:
    folder = tmp_path / "tokenizer"
    with (
        files_of_at_most(num_bytes),
        pytest.raises(CheckpointError, match="cannot be written") as e,
    ):
        tokenizer.save(folder)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []
    tokenizer.save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with files_of_at_most(num_bytes), pytest.raises(CheckpointError):
        tokenizer.save(folder, chat=ChatConfig(human="changed"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
