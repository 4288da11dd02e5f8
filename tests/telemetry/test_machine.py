"""What a run says about the machine it ran on."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from megachat.telemetry.machine import (
    available_bytes,
    machine_facts,
    processor_name,
    version_facts,
)


def test_versions_are_those_of_the_installed_packages() -> None:
    facts = {fact.name: fact.value for fact in version_facts(("torch", "no-such-package"))}
    assert facts == {
        "python": platform.python_version(),
        "torch": version("torch"),
        "no-such-package": "not installed",
    }


def test_every_fact_about_the_machine_has_a_value() -> None:
    facts = machine_facts()
    assert len({fact.name for fact in facts}) == len(facts)
    assert all(fact.value for fact in facts)


def test_processor_name_is_read_from_the_first_model_line(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Example CPU: 9000\nmodel name\t: other\n")
    assert processor_name(info) == "Example CPU: 9000"


def test_processor_without_a_model_line_is_called_by_its_architecture(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    assert processor_name(tmp_path / "cpuinfo") == platform.machine()
    assert processor_name(tmp_path / "absent") == platform.machine()


def test_available_memory_is_what_is_free_or_what_a_container_may_use(tmp_path: Path) -> None:
    info, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    info.write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:    3000 kB\n")
    cpu = torch.device("cpu")
    assert available_bytes(cpu, info=info, limit=limit) == 3000 * 1024
    limit.write_text("max\n")
    assert available_bytes(cpu, info=info, limit=limit) == 3000 * 1024
    limit.write_text("1000000\n")
    assert available_bytes(cpu, info=info, limit=limit) == 1_000_000
