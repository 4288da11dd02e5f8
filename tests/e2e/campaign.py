"""Draws what may be wrong with a run, runs the command on it, and says what must not have happened.

A draw is a folder with a tiny OPT, rows and a configuration, one or two of which are damaged, and a
command line; some commands get a signal. Whatever was drawn, the command ends with 0 or 2 (or 128 +
the signal), says in one line what is wrong, and leaves no process, no half file and no number that
is none. Draws are numbered: one number is the same draw on every machine.

The commands are forked from a process that has the heavy modules loaded, so that a draw costs a
tenth of what a shell would pay; from there on they are what a shell runs.
"""

import json
import math
import multiprocessing as mp
import os
import pickle
import re
import signal
import struct
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from megachat.stages.config import RunConfig

SECONDS = 240.0
"""More than any draw takes on a busy machine: who needs longer hangs."""
SECONDS_TO_LEAVE = 60.0
"""From the end of a command to the end of the last process that it started: a fork server that is
still importing looks up only afterwards, and on a busy machine that is long."""
MARK = "was-executed"
"""A file that a hostile pickle writes when somebody loads it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_WORDS = "how are you today fine thanks tell me about the red blue big small cat dog".split()
_HOSTILE = (
    "0 -1 1 2 3 7 1.5 -0.0 1e-320 1e30 nan inf -inf true false '' [] {} x 2147483648 "
    "1000000000000 99999999999999999999 [0,0,0] [1,0,0] {a=1} ../.. /dev/null / \u2028 0x10"
).split(" ")
_ENDLESS = re.compile(r"(max_steps|epochs|\.seed|join_seconds|max_new_tokens)$")
"""Keys of which a large value is a long run and not a mistake."""
_RUN = """\
[run]
output = "out"
[launch]
processes = 1
device = "cpu"
join_seconds = 2.0
[data]
validation_share = 0.2
max_prompt_tokens = 32
max_tokens = 96
cache_dir = "cache"
[[data.sources]]
name = "mine"
path = "d.jsonl"
split = [1, 1, 1]
[models.actor]
model = "opt"
precision = "fp32"
[models.reward]
model = "sft"
precision = "fp32"
[sft]
batch_rows = 4
max_steps = 1
evaluation_rows = 4
[reward]
batch_pairs = 4
max_steps = 1
evaluation_rows = 4
[rlhf]
batch_prompts = 4
max_steps = 1
evaluation_rows = 4
[rlhf.sampling]
max_new_tokens = 4
[rlhf.ppo]
minibatches = 1
[rlhf.ppo.reward]
normalization_samples = 4
"""


@dataclass(kw_only=True)
class Draw:
    """What is done to a whole run's folder, and the command on it."""

    number: int
    command: list[str] = field(default_factory=lambda: ["sft", "--config", "run.toml"])
    damage: list[str] = field(default_factory=list)
    """In words, for whoever has to find out what went wrong."""
    sent: signal.Signals | None = None
    delay: float = 0.0
    """Seconds after which the signal is sent: any moment of a run is as good as another."""

    def __str__(self) -> str:
        """How a finding names it."""
        after = f", {self.sent.name} after {self.delay:.2f} s" if self.sent else ""
        return f"draw {self.number}: megachat {' '.join(self.command)} on {self.damage}{after}"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a command left behind."""

    exit_code: int | None
    """None: it hung and was killed."""
    output: str
    errors: str
    orphans: list[int]


def write_whole_run(folder: Path) -> None:
    """A run that nothing is wrong with: `opt/`, `d.jsonl` and `run.toml`."""
    vocab = {word: number for number, word in enumerate(("<s>", "<pad>", "</s>", "<unk>"))}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    controls = [AddedToken(word, special=True) for word in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer.add_special_tokens(controls)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder / "opt")
    torch.manual_seed(0)
    OPTForCausalLM(
        OPTConfig(
            vocab_size=264,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            word_embed_proj_dim=16,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )
    ).save_pretrained(folder / "opt")
    random = Random(0)
    rows = [
        {
            "prompt": " ".join(random.choices(_WORDS, k=3)),
            "chosen": " " + " ".join(random.choices(_WORDS, k=random.randint(1, 4))),
            "rejected": f" {random.choice(_WORDS)} x",
        }
        for _ in range(60)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "d.jsonl").write_text(text, encoding="utf-8")
    (folder / "run.toml").write_text(_RUN, encoding="utf-8")


def make_draw(number: int, folder: Path) -> Draw:
    """Damages the whole run in `folder` as the number says."""
    random = Random(number)
    draw = Draw(number=number)
    chosen = random.choices(_KINDS, weights=_WEIGHTS, k=random.choice((1, 1, 2)))
    for kind in _KINDS:  # in this order: what takes a file away comes after what writes into it
        if kind in chosen:
            draw.damage.append(kind(random, folder, draw))
    if draw.sent is None and random.random() < 0.25:
        draw.command.append("--dry-run")
    return draw


def find_faults(draw: Draw, ended: Ended, folder: Path) -> list[str]:
    """What must not have happened, in words; empty where all is well."""
    return [fault for fault in _faults(draw, ended, folder) if fault]


def run_command(draw: Draw, folder: Path) -> Ended:
    """Runs a draw's command in its folder, as a shell would, and waits for all that it started."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    (folder / "tmp").mkdir()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_command_main, args=(draw.command, str(folder), sender))
    process.start()
    sender.close()
    receiver.recv()
    assert process.pid is not None
    if draw.sent is not None:
        process.join(draw.delay)
        if process.is_alive():
            os.kill(process.pid, draw.sent)
    process.join(SECONDS)
    hung = process.is_alive()
    orphans = [] if hung else _wait_for_session(process.pid)
    for pid in _session(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.join()
    code = process.exitcode
    assert code is not None
    return Ended(
        exit_code=None if hung else code if code >= 0 else 128 - code,  # as a shell says it
        output=(folder / "stdout").read_text(encoding="utf-8", errors="replace"),
        errors=(folder / "stderr").read_text(encoding="utf-8", errors="replace"),
        orphans=orphans,
    )


def config_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    for name, info in model.model_fields.items():
        nested = _nested(info.annotation)
        if nested is None:
            yield prefix + name
        else:
            step = "0." if typing.get_origin(info.annotation) is tuple else ""
            yield from config_keys(nested, f"{prefix}{name}.{step}")


def _nested(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        found = (_nested(argument) for argument in typing.get_args(annotation))
        return next((each for each in found if each is not None), None)
    return None


# What can be wrong. Each damages one thing and says in words what.


def _setting(random: Random, folder: Path, draw: Draw) -> str:
    key = random.choice(_KEYS)
    value = random.choice(_HOSTILE)
    if _ENDLESS.search(key) and len(value) > 4:
        value = "0"
    item = f"{key}={value}"
    draw.command += ["--set", item]
    return f"setting {item}"


def _toml(random: Random, folder: Path, draw: Draw) -> str:
    path = folder / "run.toml"
    return f"run.toml: {_damage_bytes(random, path)}"


def _rows(random: Random, folder: Path, draw: Draw) -> str:
    path = folder / "d.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    name, row = random.choice(_ROWS)
    count = random.choice((1, 2, len(lines)))
    for _ in range(count):
        lines[random.randrange(len(lines))] = row + b"\n"
    path.write_bytes(b"".join(lines))
    return f"{count} rows: {name}"


def _data_file(random: Random, folder: Path, draw: Draw) -> str:
    path = folder / "d.jsonl"
    what = random.choice(("bytes", "empty", "folder", "missing", "gz", "csv", "parquet", "loop"))
    if what == "bytes":
        return f"d.jsonl: {_damage_bytes(random, path)}"
    if what == "empty":
        path.write_bytes(b"")
        return "d.jsonl is empty"
    path.rename(folder / "rows")
    if what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path)
    elif what != "missing":
        (folder / "rows").rename(folder / f"d.{what}")
        draw.command += ["--set", f'data.sources=[{{path = "d.{what}"}}]']
    return f"d.jsonl: {what}"


def _model_config(random: Random, folder: Path, draw: Draw) -> str:
    path = folder / "opt/config.json"
    if random.random() < 0.3:
        return f"opt/config.json: {_damage_bytes(random, path)}"
    values = json.loads(path.read_text())
    key = random.choice(sorted(values))
    value = random.choice((0, -1, 1, 3, 2**40, 0.5, "x", None, [], {}, True, "gelu", [1, 2]))
    values[key] = value
    path.write_text(json.dumps(values))
    return f"opt/config.json: {key} is {value!r}"


def _weights(random: Random, folder: Path, draw: Draw) -> str:
    path = folder / "opt/model.safetensors"
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    what = random.choice(("nan", "inf", "header", "length", "cut", "missing", "pickle", "dtype"))
    if what in ("nan", "inf"):
        at = 8 + length + 4 * random.randrange((len(raw) - 8 - length) // 4)
        raw[at : at + 4] = struct.pack("<f", math.nan if what == "nan" else math.inf)
    elif what == "header":
        raw[8 + random.randrange(length)] = random.randrange(256)
    elif what == "length":
        raw[:8] = struct.pack("<Q", random.choice((0, 1, length + 8, 2**40, 2**63)))
    elif what == "dtype":
        raw = bytearray(raw.replace(b'"F32"', b'"I32"', 1))
    elif what == "cut":
        del raw[random.randrange(len(raw)) :]
    path.write_bytes(raw)
    if what in ("missing", "pickle"):
        path.unlink()
    if what == "pickle":
        (folder / "opt/pytorch_model.bin").write_bytes(pickle.dumps(_Hostile()))
    return f"opt/model.safetensors: {what}"


def _tokenizer(random: Random, folder: Path, draw: Draw) -> str:
    path = folder / "opt" / random.choice(("tokenizer.json", "tokenizer_config.json"))
    if random.random() < 0.2:
        path.unlink()
        return f"{path.name} is missing"
    if path.name == "tokenizer.json" and random.random() < 0.5:
        values = json.loads(path.read_text())
        added = {**values["added_tokens"][0], "id": 263 + random.randrange(3), "content": "<more>"}
        values["added_tokens"].append(added)
        path.write_text(json.dumps(values))
        return f"tokenizer.json has token {added['id']}"
    return f"{path.name}: {_damage_bytes(random, path)}"


def _output(random: Random, folder: Path, draw: Draw) -> str:
    name, content = random.choice(
        (
            ("out", "a file"),
            ("out/sft", "a file"),
            ("out/sft/model/foreign", "somebody else's"),
            ("out/sft/model", "a file"),
            ("out/sft/result.json", "{"),
            ("out/sft/result.json", "[]"),
            ("out/sft/result.json", "{}"),
            ("out/config.json", "{"),
            ("out/tokenizer", "a file"),
            ("out/tokenizer/tokenizer.json", "{}"),
            ("out/tokenizer.fingerprint", "0"),
            ("out/logs", "a file"),
            ("out/sft/metrics.jsonl", "not JSON\n"),
            ("out/sft/metrics.jsonl/folder", ""),
            ("cache", "a file"),
        )
    )
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return f"{name} holds {content!r}"


def _signal(random: Random, folder: Path, draw: Draw) -> str:
    draw.sent = random.choice(SIGNALS)
    draw.delay = random.uniform(0.0, 4.0)
    draw.command = ["train", "--config", "run.toml", "--set", "rlhf.max_steps=50"]
    if random.random() < 0.2:
        draw.command += ["--set", "launch.processes=2"]
        draw.delay *= 4
    return "nothing"


def _command_line(random: Random, folder: Path, draw: Draw) -> str:
    draw.command = random.choice(
        (
            ["sft", "--config", "absent.toml"],
            ["sft", "--config", "."],
            [
                "sft",
                "--config",
                "run.toml",
                "--set",
                random.choice(("", "=", "a", ".=1", "a..b=1")),
            ],
            ["rlhf", "--config", "run.toml"],
            ["reward", "--config", "run.toml"],
            ["train", "--actor-model", random.choice(("opt", "", ".", "no/such", "../opt"))],
            ["train", "--config", "run.toml", "--actor-model", "opt"],
            ["train", "--config", "run.toml", "--set", f"launch.nodes={random.choice((2, 3))}"],
            ["fetch", "--config", random.choice(("run.toml", "absent.toml"))],
            ["plan", "--model", random.choice(("opt", "facebook/opt-13b", "x", ""))],
            ["plan", "--model", "facebook/opt-13b", "--nodes", random.choice(_HOSTILE)],
        )
    )
    if draw.command[0] in ("plan", "fetch"):
        draw.sent, draw.delay = signal.SIGTERM, SECONDS  # no dry run: it has none
    return "nothing"


_KEYS = sorted(config_keys())
_KINDS: tuple[Callable[[Random, Path, Draw], str], ...] = (
    _setting,
    _toml,
    _rows,
    _data_file,
    _model_config,
    _weights,
    _tokenizer,
    _output,
    _signal,
    _command_line,
)
_WEIGHTS = (8, 2, 3, 2, 3, 3, 2, 2, 2, 2)
_ROWS: tuple[tuple[str, bytes], ...] = (
    ("a lone surrogate", rb'{"prompt": "a", "chosen": "\ud83d", "rejected": "b"}'),
    ("deep", b"[" * 100_000),
    ("deep objects", b'{"a":' * 50_000),
    ("a number", b"1"),
    ("null", b"null"),
    ("not UTF-8", b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}'),
    ("no answer", b'{"prompt": "a"}'),
    ("another type", b'{"prompt": 1, "chosen": [2], "rejected": {}}'),
    ("controls", rb'{"prompt": "a\u0000b", "chosen": "c\u2028d", "rejected": "\u0007"}'),
    ("half an object", b'{"prompt": "a", "cho'),
    ("empty texts", b'{"prompt": "", "chosen": "", "rejected": ""}'),
    ("NaN", b'{"prompt": NaN, "chosen": Infinity, "rejected": 1e999}'),
    ("a large number", b'{"prompt": ' + b"9" * 5000 + b', "chosen": "a", "rejected": "b"}'),
    ("a long text", b'{"prompt": "a", "chosen": "' + b"b " * 20_000 + b'", "rejected": "c"}'),
    ("the same keys", b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}'),
    ("empty line", b""),
)


class _Hostile:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (MARK, "w")


def _damage_bytes(random: Random, path: Path) -> str:
    raw = bytearray(path.read_bytes())
    what = random.choice(("cut", "flip", "insert", "empty", "list", "utf-16", "binary"))
    if what == "cut":
        del raw[random.randrange(len(raw)) :]
    elif what == "flip":
        for _ in range(random.choice((1, 3, 30))):
            raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    elif what == "insert":
        at = random.randrange(len(raw))
        raw[at:at] = random.choice((b"\0", b"\xff\xfe", b"\n\n", b'"', b"[[[[", b"\xed\xa0\xbd"))
    elif what == "utf-16":
        raw = bytearray(raw.decode("utf-8", "replace").encode("utf-16"))
    else:
        raw = bytearray({"empty": b"", "list": b"[]", "binary": random.randbytes(500)}[what])
    path.write_bytes(raw)
    return what


def _command_main(command: list[str], folder: str, ready: Connection) -> None:
    """What the forked process does: from here on it is `megachat`."""
    os.setsid()
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ["TMPDIR"] = f"{folder}/tmp"
    tempfile.tempdir = None
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["megachat", *command]
    ready.send(True)
    from megachat.cli.start import main

    main()


def _session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path(f"/proc/{entry}/stat").read_text().rsplit(") ", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(words[3]) == leader and words[0] != "Z":
                found.append(int(entry))
    return found


def _wait_for_session(leader: int) -> list[int]:
    """What still lives of a session some time after its leader has ended."""
    deadline = time.monotonic() + SECONDS_TO_LEAVE
    while (left := _session(leader)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _faults(draw: Draw, ended: Ended, folder: Path) -> Iterator[str]:
    allowed = {0, 2} if draw.sent is None else {0, 2, 128 + draw.sent}
    if ended.exit_code is None:
        yield f"did not end in {SECONDS:g} s"
    elif ended.exit_code not in allowed:
        yield f"exit code {ended.exit_code}"
    if "Traceback" in ended.errors + ended.output:
        yield "a traceback"
    if ended.orphans:
        yield f"processes {ended.orphans} go on"
    if ended.exit_code == 2 and "Usage:" not in ended.errors:
        told = re.findall(r"^[A-Za-z]+Error: .+$", ended.errors, flags=re.MULTILINE)
        if len(told) != 1 or not ended.errors.rstrip().endswith(told[0]):
            yield f"{len(told)} lines that say what is wrong, or not the last one"
    if (folder / MARK).exists():
        yield "the pickle of a foreign file was executed"
    if left := sorted(path.name for path in (folder / "tmp").iterdir()):
        yield f"TMPDIR holds {left}"
    has_run = ended.exit_code == 0 and "--dry-run" not in draw.command
    yield from _file_faults(folder / "out", succeeded=has_run)


def _file_faults(output: Path, *, succeeded: bool) -> Iterator[str]:
    """Half files, and numbers that are none, in a run folder."""
    for path in sorted(output.rglob("*")) if output.is_dir() else ():
        if "draft" in path.name:
            yield f"{path} was left"
        if path.name == "model.safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if not file.get_tensor(name).isfinite().all():
                        yield f"{path}: {name} is not finite"
        if succeeded and path.suffix == ".json" and path.is_file():
            try:
                json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
            except ValueError as error:
                yield f"{path}: {error}"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
