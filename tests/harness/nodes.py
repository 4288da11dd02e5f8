"""`Nodes`: several launchers or ranks of one job as processes of this machine, each with variables.

Processes are forked from the server of `run_ranks`, with all modules loaded. The fork server that a
launcher starts for its ranks is forked as well, instead of a fresh interpreter that would import
for ten seconds; everything else is what runs in production.
"""

import contextlib
import json
import logging
import multiprocessing as mp
import multiprocessing.util
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

END_SECONDS = 120.0
"""After which a test gives up on a process, on a machine that does much else."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a process ended."""

    exit_code: int
    message: str
    """What `launch` raised, as the command line writes it, and what it wrote to standard error, log
    lines left out: those that say that nodes are waited for depend on the load of the machine."""
    at: float
    """Time of the end, of `time.time`."""


class Nodes:
    """Processes of one job; those that still run are killed at the end of the `with` block."""

    def __init__(self, folder: Path) -> None:
        """Processes leave their words in `folder`."""
        self._folder = folder
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.harness.preload"])
        self._processes: list[BaseProcess] = []

    def start(
        self, target: Callable[..., None], *args: Any, variables: Mapping[str, str] | None = None
    ) -> None:
        """Starts `target(*args)` in a process whose environment has these variables in addition."""
        number = len(self._processes)
        process = self._context.Process(
            target=_main, args=(self._folder / f"end{number}", variables or {}, target, args)
        )
        process.start()
        self._processes.append(process)

    def pid(self, number: int) -> int:
        """Of a started process."""
        pid = self._processes[number].pid
        assert pid is not None
        return pid

    def kill(self, number: int) -> None:
        """As the system does when memory runs out."""
        os.kill(self.pid(number), signal.SIGKILL)

    def ends(self, *, seconds: float = END_SECONDS) -> Sequence[End]:
        """Waits for all processes, so long for each."""
        ends = []
        for number, process in enumerate(self._processes):
            process.join(seconds)
            assert not process.is_alive(), f"process {number} of the job does not end"
            path = self._folder / f"end{number}"
            words = path.with_suffix(".stderr").read_text()
            said = json.loads(path.read_text()) if path.exists() else {"message": "", "at": 0.0}
            ends.append(
                End(
                    exit_code=process.exitcode or 0,
                    message=said["message"] + words,
                    at=max(said["at"], path.with_suffix(".stderr").stat().st_mtime),
                )
            )
        return ends

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends what still runs."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Polls until something outside this process has happened."""
    deadline = time.monotonic() + END_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def _main(
    end: Path, variables: Mapping[str, str], target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """Runs the function; its MegachatError becomes the exit status, as on the command line."""
    from megachat.errors import MegachatError

    os.dup2(os.open(end.with_suffix(".stderr"), os.O_CREAT | os.O_WRONLY), 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}
    logging.getLogger().addHandler(logging.FileHandler(end.with_suffix(".log")))
    multiprocessing.util.spawnv_passfds = _fork_server
    message, code = "", 0
    try:
        target(*args)
    except MegachatError as error:
        message, code = f"{type(error).__name__}: {error}", error.exit_code
    draft = end.with_suffix(".draft")
    draft.write_text(json.dumps({"message": message, "at": time.time()}))
    draft.rename(end)
    os._exit(code)


def _fork_server(path: bytes, args: Sequence[str], passfds: Sequence[int]) -> int:
    """In place of `spawnv_passfds`: a process with these descriptors that runs the same code."""
    pid = os.fork()
    if pid == 0:
        kept = {0, 1, 2, *passfds}
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in kept:
                with contextlib.suppress(OSError):
                    os.close(int(name))
        try:
            exec(args[-1], {})
        except SystemExit:
            pass
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid
