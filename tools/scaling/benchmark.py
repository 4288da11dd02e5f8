"""The one place for what the benchmarks of this folder share: options, limits, start, output.

Scripts import it by its bare name, since a script's own folder is where Python looks first.
"""

import contextlib
import inspect
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import typer

from megachat.config import ConfigModel
from megachat.errors import ConfigError, MegachatError
from megachat.parallel.launch import LaunchConfig, launch
from megachat.records import PromptBatch
from megachat.telemetry.machine import CPU_INFO, processor_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CPU = torch.device("cpu")
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Of the buffer that is read, by kind of device: much more than any cache holds."""
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What this machine did in the same run, the best of several tries."""

    read_gb_s: float
    """10^9 bytes a second, reading a buffer much larger than the caches."""
    gemm_tflop_s: float
    """10^12 operations a second in a large product of the run's dtype."""

    @classmethod
    def best_of(cls, tries: Iterable["Ceilings"]) -> Self:
        """The largest of each."""
        pairs = [(each.read_gb_s, each.gemm_tflop_s) for each in tries]
        read, gemm = (max(values) for values in zip(*pairs, strict=True))
        return cls(read_gb_s=read, gemm_tflop_s=gemm)


def measure_ceilings(
    dtype: torch.dtype,
    *,
    device: torch.device = CPU,
    clock: Callable[[], float] = time.perf_counter,
    tries: int = 1,
) -> Ceilings:
    """The best of some tries at both limits, with torch's present number of threads."""
    num_bytes, size = READ_BYTES[device.type], _GEMM_SIZE[device.type]
    buffer = torch.ones(num_bytes // 4, device=device)
    # Random numbers: a GPU multiplies ones or zeros faster, since few bits change.
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for action in (buffer.sum, lambda: left @ right):
        action()
        finish(device)
        found = []
        for _ in range(tries):
            start = clock()
            action()
            finish(device)
            found.append(clock() - start)
        seconds.append(min(found))
    return Ceilings(
        read_gb_s=num_bytes / seconds[0] / 1e9, gemm_tflop_s=2 * size**3 / seconds[1] / 1e12
    )


def finish(device: torch.device) -> None:
    """Waits until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_prompts(vocab_size: int, *, batch: int, length: int) -> PromptBatch:
    """Prompts of equal length, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return PromptBatch(
        tokens=torch.randint(4, vocab_size, (batch, length), generator=generator),
        lengths=torch.full((batch,), length),
        ids=torch.arange(batch),
    )


def machine_state(device: torch.device = CPU) -> dict[str, Any]:
    """What a result must be read with: who computed, and how busy the machine was."""
    is_cpu = device.type == "cpu"
    return {
        "processor": processor_name(CPU_INFO) if is_cpu else torch.cuda.get_device_name(device),
        "load_average": Path("/proc/loadavg").read_text(encoding="utf-8").split()[:3],
    }


def run_benchmark(
    run_rank: Callable[..., None],
    settings: ConfigModel,
    *,
    processes: int = 1,
    threads: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Starts the ranks and returns the summary that they write.

    Args:
        run_rank: Called as `run_rank(worker, settings, output)`; one rank writes JSON to `output`.
        settings: What is measured.
        processes: Number of ranks.
        threads: Of each rank.
        device: cpu or cuda.

    Raises:
        MegachatError: What the first failing rank raised.
    """
    config = LaunchConfig(processes=processes, device=device, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "summary.json")
        launch(config, run_rank, settings, str(output))
        summary: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return summary


@contextlib.contextmanager
def peer_process(
    python: str, script: Path, request: dict[str, Any], *, log: Path
) -> Iterator[Callable[[], Any]]:
    """Another environment's interpreter that measures something whenever it is asked.

    Args:
        python: The interpreter, `--peer-python`.
        script: Takes the request as JSON in its only argument; for each line of input it measures
            once and writes one line, `reply` and JSON.
        request: What it is to measure.
        log: Where its errors go.

    Yields:
        A function that asks once and returns the reply. It raises ConfigError if the interpreter
        cannot be started or lacks what the script imports.
    """
    # It is alone: what our launcher tells its ranks would make it wait for others.
    command = ["env", *(f"--unset={name}" for name in RANK_VARIABLES)]
    command += [python, str(script), json.dumps(request, allow_nan=False)]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        requests, replies = process.stdin, process.stdout

        def ask() -> Any:
            with contextlib.suppress(BrokenPipeError):
                requests.write("again\n")
                requests.flush()
            for line in replies:
                if line.startswith("reply "):
                    return json.loads(line.removeprefix("reply "))
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise ConfigError(
                f"--peer-python {python}: {script.name} failed ({' '.join(last) or 'no message'}): "
                "give an interpreter whose environment has what that script says"
            )

        try:
            yield ask
        finally:
            process.kill()
            process.wait()


def report(
    measure: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], str], *, as_json: bool
) -> None:
    """Prints what was measured, as JSON or as `show` says; an error as one line and status 2."""
    try:
        summary = measure()
    except MegachatError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(summary, allow_nan=False) if as_json else show(summary))


def command_of(settings: type[ConfigModel], main: Callable[..., None]) -> Callable[..., None]:
    """`main` with an option for each field of the settings, and `--json` as `as_json`."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            name,
            keyword,
            default=field.get_default(call_default_factory=True),
            annotation=Annotated[field.annotation, typer.Option(help=field.description)],
        )
        for name, field in settings.model_fields.items()
    ]
    flag = Annotated[bool, typer.Option("--json", help="Prints JSON.")]
    parameters.append(inspect.Parameter("as_json", keyword, default=False, annotation=flag))

    def command(**options: Any) -> None:
        main(**options)

    command.__doc__ = main.__doc__
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command
