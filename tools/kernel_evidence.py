"""Writes `docs/kernels.md`: what nvcc makes of the CUDA kernels, and what a decode step moves.

python -m tools.kernel_evidence            # rewrites the page
python -m tools.kernel_evidence --check   # exit status 1 where it is out of date

It needs nvcc and g++ on PATH and nvdisasm, from a CUDA toolkit or the package nvidia-cuda-nvdisasm;
no GPU. Every source in kernels/cuda is on the page; a launch is described in `kernel_launches`.
"""

import functools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from megachat.errors import KernelError
from tools.build_cache import digest_of
from tools.kernel_launches import (
    CACHE,
    KERNELS,
    MULTIPROCESSORS,
    Call,
    Format,
    Launch,
    Shape,
    decode_calls,
    other_calls,
    shape_of,
)

PAGE = KERNELS.parent / "docs" / "kernels.md"
ARCHITECTURES = ("80", "90a")
WARPS = 64
"""That a multiprocessor of either architecture can hold."""
DISASSEMBLER = "nvidia-cuda-nvdisasm"
SHAPES = (
    shape_of("facebook/opt-125m"),
    shape_of("facebook/opt-13b"),
    shape_of("facebook/opt-175b", ranks=8),
)
FEW_ROWS = shape_of("facebook/opt-175b", ranks=8, rows=16)
"""Whose messages between ranks are short enough for the all-reduce in fp32, too."""

INTRODUCTION = """\
<!-- Written by `python -m tools.kernel_evidence`; a test compares. Do not edit by hand. -->

# CUDA kernels: what can be known without a GPU

**Nothing on this page is a measurement**, and nothing on it says how fast the kernels are. It is
what the compiler made of the sources, what its occupancy formula says, and how many bytes follow
from shapes. That results are right is shown on an emulator (`kernels/README.md`); what a GPU made
of them is in `docs/measurements/gpu.md`.
"""


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance of a kernel for one architecture: what ptxas reports, and its instructions."""

    name: str
    """Mangled."""
    architecture: str
    frame_bytes: int
    spilled_bytes: int
    registers: int

    @property
    def kernel(self) -> str:
        """Its name in the source, without template arguments."""
        found = re.search(r"\d([a-z_]+_kernel)(?=[IE])", self.name)
        return found.group(1) if found else self.name

    def has(self, number: Format) -> bool:
        """Whether it is for this format."""
        return f"_kernel{number.cuda_name}" in self.name

    @property
    def has_format(self) -> bool:
        """Whether it is for a format at all."""
        return any(self.has(number) for number in Format)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler says of one source."""

    instances: tuple[Instance, ...]
    ptx: dict[str, str]
    """Text of each entry, of the first architecture."""
    cubins: dict[str, Path]
    """By architecture."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of one multiprocessor."""

    blocks: int
    limit: str


_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'\n"
    r".*?(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_FUNCTION = re.compile(r"^\.text\.(\w+):$", re.MULTILINE)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9.a-z_]*)")


def sources() -> list[str]:
    """Stems of all kernel sources."""
    return sorted(path.stem for path in (KERNELS / "cuda").glob("*.cu"))


@functools.cache
def compiled(source: str) -> Compiled:
    """Compiles a source with warnings as errors, unless this very compiler has done so before.

    Raises:
        KernelError: There is no nvcc, or it refuses the source.
    """
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    flags = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills")
    path = KERNELS / "cuda" / f"{source}.cu"

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            kept = ("-keep", "-keep-dir", scratch, "--threads", "2")
            text = _run([_nvcc(), *flags, *targets, *kept, "-c", path, "-o", f"{scratch}/out.o"])
            for name in ARCHITECTURES:
                shutil.copy(next(Path(scratch).glob(f"*_{name}*.cubin")), folder / _cubin(name))
            ptx = next(Path(scratch).glob(f"*compute_{ARCHITECTURES[0]}*.ptx"))
            shutil.copy(ptx, folder / "entries.ptx")
        (folder / "ptxas").write_text(text)

    inputs = (path, *sorted((KERNELS / "include").glob("*.h")))
    folder = CACHE.folder_of(digest_of([*flags, *targets, compiler_version()], inputs), make)
    instances = tuple(
        Instance(
            name=found["name"],
            architecture=found["architecture"],
            frame_bytes=int(found["frame"]),
            spilled_bytes=int(found["stores"]) + int(found["loads"]),
            registers=int(found["registers"]),
        )
        for found in _REPORT.finditer((folder / "ptxas").read_text())
    )
    bodies = re.split(r"\.entry (\w+)", (folder / "entries.ptx").read_text())[1:]
    cubins = {name: folder / _cubin(name) for name in ARCHITECTURES}
    return Compiled(instances, dict(zip(bodies[::2], bodies[1::2], strict=True)), cubins)


def _cubin(architecture: str) -> str:
    return f"sm_{architecture}.cubin"


@functools.cache
def instructions(source: str, architecture: str) -> dict[str, Counter[str]]:
    """How often each machine instruction stands in each instance, by mangled name.

    Raises:
        KernelError: There is no disassembler, or it cannot read what nvcc wrote.
    """
    cubin = compiled(source).cubins[architecture]
    reader, name = disassembler(), "instructions.sass"
    key = digest_of([name, _run([reader, "--version"])], [cubin])

    def make(folder: Path) -> None:
        (folder / name).write_text(_run([reader, "-c", cubin]))

    listing = CACHE.folder_of(key, make) / name
    bodies = _FUNCTION.split(listing.read_text())[1:]
    return {
        name: Counter(_INSTRUCTION.findall(body))
        for name, body in zip(bodies[::2], bodies[1::2], strict=True)
    }


def count(found: Counter[str], prefix: str, *, wide: bool = False) -> int:
    """Instructions whose name begins like this; `wide` ones move 16 bytes a thread."""
    return sum(
        number
        for name, number in found.items()
        if name.split(".")[0] == prefix and (not wide or "128" in name.split("."))
    )


def disassembler() -> str:
    """Where nvdisasm is.

    Raises:
        KernelError: Nowhere.
    """
    found = shutil.which("nvdisasm")
    if found is not None:
        return found
    try:
        files = metadata.files(DISASSEMBLER) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm":
            return str(file.locate())
    raise KernelError(f"nvdisasm is not on PATH: pip install {DISASSEMBLER}, or a CUDA toolkit")


@functools.cache
def compiler_version() -> str:
    """What nvcc says of itself, the release in it.

    Raises:
        KernelError: There is no nvcc.
    """
    return _run([_nvcc(), "--version"])


def release() -> str:
    """Nvcc's version, as `V13.0.88`."""
    found = re.search(r"V\d+\.\d+\.\d+", compiler_version())
    return found.group() if found else "of an unknown version"


def occupancies(asked: Sequence[tuple[Instance, Launch]]) -> list[Occupancy]:
    """How many blocks of each launch fit a multiprocessor."""
    program = Path(__file__).with_name("kernel_occupancy.cpp")
    name = "occupancy"

    def make(folder: Path) -> None:
        _run([_nvcc(), "-x", "c++", program, "-o", folder / name])

    target = CACHE.folder_of(digest_of([name, compiler_version()], [program]), make) / name
    lines = [
        f"{instance.architecture} {instance.registers} {launch.threads} {launch.shared_bytes}\n"
        for instance, launch in asked
    ]
    answers = _run([target], given="".join(lines)).split()
    return [
        Occupancy(int(blocks), limit)
        for blocks, limit in zip(answers[::2], answers[1::2], strict=True)
    ]


def _nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        raise KernelError("nvcc is not on PATH: install a CUDA toolkit; no GPU is needed")
    return found


def _run(command: Sequence[str | Path], *, given: str | None = None) -> str:
    ran = subprocess.run(list(map(str, command)), input=given, capture_output=True, text=True)
    if ran.returncode != 0:
        raise KernelError(f"{Path(command[0]).name} failed: {(ran.stderr or ran.stdout)[:2000]}")
    return ran.stdout + ran.stderr


def page() -> str:
    """The whole page."""
    parts = [
        INTRODUCTION,
        _compiler_section(),
        *(_instance_table(architecture) for architecture in ARCHITECTURES),
        _traffic_section(),
        *(_step_table(shape) for shape in SHAPES),
        _others_table(),
    ]
    return "\n".join(parts)


def _compiler_section() -> str:
    return f"""\
## Instances

Compiled by nvcc {release()} with `-O3` and warnings as errors. A row stands for all instances of a
kernel in a format (head sizes, numbers of packs or tokens): the most registers, the fewest of what
there should be and the most of what there should not. Counts are of instructions in the machine
code, not of executions. *16-byte loads* and *stores* are of global memory (LDG.128, STG.128),
*copies* go from global to shared memory without registers (LDGSTS), *tensor* are matrix
instructions (HMMA), *local* are accesses to spilled registers or stacks (LDL, STL). Blocks and
warps are those that a multiprocessor holds, of {WARPS} warps, for the launch with the most shared
memory and threads of those below, by the toolkit's `cuda_occupancy.h`.
"""


def _instance_table(architecture: str) -> str:
    launches = _largest_launches()
    rows: list[tuple[list[Instance], str, str]] = []
    for source in sources():
        instances = [i for i in compiled(source).instances if i.architecture == architecture]
        for kernel in sorted({instance.kernel for instance in instances}):
            own = [instance for instance in instances if instance.kernel == kernel]
            for number in Format:
                rows.append(([i for i in own if i.has(number)], source, number.label))
            rows.append(([i for i in own if not i.has_format], source, "any"))
    rows = [row for row in rows if row[0]]
    asked = []
    for own, _, label in rows:
        launch = launches.get((own[0].kernel, label))
        if launch is None:
            raise KernelError(
                f"no launch of {own[0].kernel} in {label} is described: tools/kernel_launches.py"
            )
        asked.append((max(own, key=lambda i: i.registers), launch))
    lines = [
        f"### sm_{architecture}",
        "",
        "| kernel | format | registers | spilled bytes | 16-byte loads | stores | copies | tensor "
        "| local | threads | shared bytes | blocks | warps | limit |",
        "|---|---|" + "---:|" * 11 + "---|",
    ]
    for (own, source, label), (_, launch), held in zip(
        rows, asked, occupancies(asked), strict=True
    ):
        found = [instructions(source, architecture)[instance.name] for instance in own]
        cells = [
            own[0].kernel,
            label,
            max(instance.registers for instance in own),
            max(instance.spilled_bytes + instance.frame_bytes for instance in own),
            min(count(f, "LDG", wide=True) for f in found),
            min(count(f, "STG", wide=True) for f in found),
            min(count(f, "LDGSTS") for f in found),
            min(count(f, "HMMA") for f in found),
            max(count(f, "LDL") + count(f, "STL") for f in found),
            launch.threads,
            launch.shared_bytes,
            held.blocks,
            held.blocks * launch.threads // 32,
            held.limit,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


@functools.cache
def _largest_launches() -> dict[tuple[str, str], Launch]:
    """For each kernel and format's label, the launch with the most shared memory."""
    largest: dict[tuple[str, str], Launch] = {}
    for number in Format:
        for shape in (*SHAPES, FEW_ROWS):
            for call in (*decode_calls(shape, number), *other_calls(shape, number)):
                for launch in call.launches():
                    for label in (number.label, "any"):
                        known = largest.get((launch.kernel, label), launch)
                        best = max(known, launch, key=lambda one: (one.shared_bytes, one.threads))
                        largest[launch.kernel, label] = best
    return largest


def _traffic_section() -> str:
    return f"""\
## Bytes of a decode step

Computed from shapes, for one rank, in bf16. *Asked for* is what the loads and stores of all blocks
add up to, wherever a cache answers them; *least* is what any implementation must read and write
once if nothing stays in a cache between calls. Both are kilobytes (10^3 bytes) for each token that
the step makes. Grids are those that the launchers choose for {MULTIPROCESSORS} multiprocessors.
Left out: the embedding's rows, and the first LayerNorm, which follows no projection.
Products are counted as our kernel computes them; with weights of one tile they are cuBLAS's
(`megachat/ops/tiled_linear.py` says when).
"""


def _step_table(shape: Shape) -> str:
    calls = decode_calls(shape, Format.BFLOAT16)
    share = f", one of {shape.ranks} tensor ranks" if shape.ranks > 1 else ""
    title = f"### {shape.name}{share}: {shape.rows} rows, {shape.context} tokens each"
    table = _call_table(calls, shape.rows)
    asked = sum(call.times * call.asked for call in calls)
    least = sum(call.times * call.least for call in calls)
    launches = sum(call.times * len(call.launches()) for call in calls)
    total = f"| **total** | {launches} | | {_kb(asked, shape.rows)} | {_kb(least, shape.rows)} | "
    return f"{title}\n\n{table}{total}{asked / least:.2f} |\n"


def _others_table() -> str:
    shape = SHAPES[1]
    table = _call_table(other_calls(shape, Format.BFLOAT16), shape.context)
    return (
        f"## Other launches\n\n{shape.name}, a prompt of {shape.context} tokens and its "
        f"log-probabilities, bytes for each of them.\n\n{table}"
    )


def _call_table(calls: Iterable[Call], tokens: int) -> str:
    lines = [
        "| call | launches | grid x threads | asked for, kB | least, kB | ratio |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for call in calls:
        launches = call.launches()
        grids = "; ".join(f"{_grid(one)} x {one.threads}" for one in launches)
        asked, least = call.times * call.asked, call.times * call.least
        lines.append(
            f"| {call.op} | {call.times * len(launches)} | {grids} | {_kb(asked, tokens)} | "
            f"{_kb(least, tokens)} | {asked / least:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _grid(launch: Launch) -> str:
    x, y, z = launch.grid
    return f"({x}, {y}, {z})" if z > 1 else f"({x}, {y})" if y > 1 else str(x)


def _kb(num_bytes: int, tokens: int) -> str:
    return f"{num_bytes / tokens / 1e3:,.1f}"


def main(
    check: Annotated[bool, typer.Option("--check", help="Compare, write nothing.")] = False,
) -> None:
    """Write docs/kernels.md, or say whether it is up to date."""
    try:
        text = page()
    except KernelError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        typer.echo(f"{PAGE} is out of date: run python -m tools.kernel_evidence", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
