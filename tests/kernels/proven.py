"""The record of which sources all faults were last put into, and who writes it.

python -m tests.kernels.proven      # exit status 1 where the record is not of these sources

By default a run looks for one fault of each kernel and shows one kernel to nvcc; `--all-faults`
does all of it. Only a run in which everything of that passed writes the record.
"""

import json
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tools.build_cache import digest_of

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("proven.json")
FAULTS_MODULE, NVCC_MODULE = "tests/kernels/test_faults.py", "tests/kernels/test_nvcc.py"
COMMAND = "pytest --all-faults tests/kernels"

_SOURCES = (
    *("kernels/cuda/*", "kernels/include/*", "kernels/emulator/*", "kernels/budgets.json"),
    *("tests/kernels/*.py", "tests/kernels/*.cu", "tools/kernel_*", "docs/kernels.md"),
)
"""What faults, and nvcc's view of the kernels, depend on."""


@dataclass(frozen=True)
class Proof:
    """What a complete run has shown."""

    sources: str
    """Hash of them."""
    faults: int
    """Tests that passed: that each fault is caught, and that nothing is found without one."""
    nvcc: bool
    """Whether there was an nvcc to compile all kernels."""


def hash_of_sources(root: Path = ROOT) -> str:
    files = sorted(path for pattern in _SOURCES for path in root.glob(pattern) if path.is_file())
    return digest_of([str(path.relative_to(root)) for path in files], files)


def read_proof(path: Path = RECORD) -> Proof | None:
    """What is recorded; None where nothing is."""
    return Proof(**json.loads(path.read_text())) if path.exists() else None


def objection(proof: Proof | None, *, sources: str, has_nvcc: bool) -> str:
    """Why the record does not cover these sources on this machine, "" if it does."""
    if proof is None or proof.sources != sources:
        return f"kernels or their tests have changed since all faults were looked for: {COMMAND}"
    if has_nvcc and not proof.nvcc:
        return f"nvcc has not compiled all kernels of the record, and is here: {COMMAND}"
    return ""


class Recorder:
    """A plugin that writes the record after a run in which all of it passed."""

    def __init__(self, path: Path = RECORD) -> None:
        self._path = path
        self._sources = hash_of_sources()
        self._passed: set[str] = set()
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.nodeid.startswith((FAULTS_MODULE, NVCC_MODULE)):
            return
        if report.failed:
            self._failed.add(report.nodeid)
        elif report.passed and report.when == "call":
            self._passed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        # Not above: these bring the whole project, which who starts a session does not need.
        from tests.kernels import test_faults, test_nvcc

        self.record(faults=test_faults.ALL_IDS, kernels=test_nvcc.BUDGETS)

    def record(self, *, faults: Collection[str], kernels: Collection[str]) -> None:
        """Writes the record if all faults were caught, nothing failed and nothing has changed.

        Args:
            faults: Names of all tests of faults, as pytest writes them behind the module.
            kernels: Those that nvcc has to compile, where there is one.
        """
        wanted = {f"{FAULTS_MODULE}::{name}" for name in faults}
        if self._failed or not wanted <= self._passed or hash_of_sources() != self._sources:
            return
        seen = [name for name in self._passed if name.startswith(NVCC_MODULE)]
        nvcc = all(any(f"[{kernel}]" in name for name in seen) for kernel in kernels)
        proof = Proof(sources=self._sources, faults=len(wanted), nvcc=nvcc)
        self._path.write_text(json.dumps(asdict(proof), indent=2) + "\n")


if __name__ == "__main__":
    _found = read_proof()
    sys.exit(0 if _found is not None and _found.sources == hash_of_sources() else 1)
