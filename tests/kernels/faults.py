"""The one place for putting faults into copies of the sources and looking who notices."""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.build import KERNELS, Variant, kernel_library
from tests.kernels.cases import Case
from tests.kernels.launch import FORWARD, ORDERS, RANDOM

FORMAT_CASES = {
    "float": "return run(static_cast<float*>(nullptr));",
    "Bfloat16": "return run(static_cast<Bfloat16*>(nullptr));",
    "Float16": "return run(static_cast<Float16*>(nullptr));",
}
FEW_INSTANCES = (
    ("include/numeric.h", "return run(std::integral_constant<int, 64>{});", "return 1;"),
    ("include/numeric.h", "return run(std::integral_constant<int, 96>{});", "return 1;"),
    ("include/numeric.h", "return run(std::integral_constant<int, 128>{});", "return 1;"),
    ("cuda/tiled_linear.cu", "return launch<T, 32>(a, stream);", "return 1;"),
    ("cuda/tiled_linear.cu", "return launch<T, kMaxTokens>(a, stream);", "return 1;"),
    ("cuda/all_reduce.cu", "(all_reduce_kernel<T, 2>)", "(all_reduce_kernel<T, 4>)"),
    ("cuda/all_reduce.cu", "(all_reduce_kernel<T, kMaxRanks>)", "(all_reduce_kernel<T, 4>)"),
)
"""With one format, leaves what the cases of faults use, so that a fault compiles in a second."""


@dataclass(frozen=True)
class Fault:
    """A change of one place in the sources."""

    name: str
    kernel: str
    old: str
    new: str
    file: str | None = None
    """Relative to `kernels`; None for the kernel itself."""
    watch: Variant = Variant.PLAIN
    cases: str | None = None
    """The cases that are to notice, if not those of the kernel."""
    only: str = "Bfloat16"
    """The one format that is built."""

    @property
    def path(self) -> str:
        return self.file or f"cuda/{self.kernel}.cu"


def sources_with(fault: Fault, folder: Path) -> Path:
    """A copy of the sources with the fault; returns the kernel."""
    shutil.copytree(KERNELS, folder / "kernels")
    others = [
        ("include/numeric.h", case, "break;")
        for name, case in FORMAT_CASES.items()
        if name != fault.only
    ]
    for path, old, new in (*others, *FEW_INSTANCES, (fault.path, fault.old, fault.new)):
        file = folder / "kernels" / path
        text = file.read_text()
        assert old in text, f"{path} has changed: {old!r} is no longer in it"
        file.write_text(text.replace(old, new))
    return folder / "kernels" / "cuda" / f"{fault.kernel}.cu"


def start_building(faults: Iterable[Fault], folder: Path) -> dict[Fault, "Future[Path]"]:
    """Compiles faults in the background, on all cores and in this order.

    Returns:
        For each, what will be its kernel's source, once it is built.
    """

    def build(fault: Fault, own: Path) -> Path:
        source = sources_with(fault, own)
        kernel_library(source, fault.watch)
        return source

    pool = ThreadPoolExecutor(os.cpu_count())
    building = {
        fault: pool.submit(build, fault, folder / str(number))
        for number, fault in enumerate(faults)
    }
    pool.shutdown(wait=False)
    return building


def first_complaint(
    cases: Sequence[Callable[[], Case]], source: Path, variant: Variant, folder: Path
) -> str:
    """What any of the runs finds, "" if none finds anything."""
    orders = {Variant.PLAIN: ORDERS, Variant.ASAN: (FORWARD,), Variant.TSAN: (RANDOM,)}[variant]
    for make in cases:
        for order in orders:
            found = make().fault_isolated(order, variant=variant, folder=folder, source=source)
            if found:
                return found
    return ""
