import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from megachat.errors import KernelError
from megachat.model import NormBackend, layers
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks
from tests.model import reference as ref

PACKAGES = ("apex", "transformer_engine")


def _package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _report(folder: Path) -> dict[str, tuple[bool, str]]:
    """The report where `folder` comes first on the path; run in a process of its own."""
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    return {item.name: (item.available, item.detail) for item in layers.accelerators()}


def test_absent_accelerators_are_reported_and_not_needed(tmp_path: Path) -> None:
    [report] = run_ranks(1, _report, tmp_path)
    expected = (False, "not installed")
    assert report == {"transformer-engine": expected, "apex": expected}


def test_wrong_packages_of_the_right_name_are_told_apart(tmp_path: Path) -> None:
    """PyPI's unrelated apex; transformer-engine without its torch part."""
    _package(
        tmp_path,
        {
            "apex/__init__.py": "__version__ = '0.9.10dev'\n",
            "transformer_engine/__init__.py": "",
            "transformer_engine/pytorch/__init__.py": "raise RuntimeError('no\\nshared object')\n",
        },
    )
    [report] = run_ranks(1, _report, tmp_path)
    assert not report["apex"][0]
    assert report["apex"][1].startswith("installed without apex.normalization")
    assert not report["transformer-engine"][0]
    assert "no shared object" in report["transformer-engine"][1]


def test_packages_that_fail_on_import_do_not_end_the_program(tmp_path: Path) -> None:
    broken = "raise OSError('libcudart.so.12')\n"
    _package(tmp_path, {f"{package}/__init__.py": broken for package in PACKAGES})
    [report] = run_ranks(1, _report, tmp_path)
    assert set(report.values()) == {(False, "broken: libcudart.so.12")}


def test_working_accelerators_are_reported_with_their_version(tmp_path: Path) -> None:
    _package(
        tmp_path,
        {
            "apex/__init__.py": "__version__ = '1.2'\n",
            "apex/normalization/__init__.py": "",
            "apex/normalization/fused_layer_norm.py": "",
            "fused_layer_norm_cuda.py": "",
            "transformer_engine/__init__.py": "",
            "transformer_engine/pytorch.py": "",
        },
    )
    [report] = run_ranks(1, _report, tmp_path)
    assert report == {"transformer-engine": (True, "unknown version"), "apex": (True, "1.2")}


_IMPORT_LAYERS = """
import sys
sys.path.insert(0, sys.argv[1])
from megachat.errors import KernelError
try:
    import megachat.model.layers
except KernelError as error:
    print(error)
"""


def test_a_broken_transformer_engine_is_explained_when_megatron_trips_over_it(
    tmp_path: Path,
) -> None:
    _package(
        tmp_path,
        {"transformer_engine/__init__.py": "raise RuntimeError('no torch extension found')\n"},
    )
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_LAYERS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "no torch extension found" in result.stdout
    assert "uninstall it" in result.stdout


def test_apex_norms_are_refused_where_apex_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = layers.Accelerator(name="apex", available=False, detail="not installed")
    monkeypatch.setattr(layers, "accelerators", lambda: (missing,))
    with pytest.raises(KernelError, match="apex is not installed: use norm_backend=torch"):
        layers.norm_kernel(NormBackend.APEX)


def _model_with_stand_in_apex() -> tuple[int, bool]:
    """A model whose norms come from a module that has apex's place and signature."""
    calls = []

    def fused_layer_norm_affine(x, weight, bias, shape, epsilon):  # type: ignore[no-untyped-def]
        calls.append(shape)
        return nn.functional.layer_norm(x, shape, weight, bias, epsilon)

    for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["fused_layer_norm_cuda"] = types.ModuleType("fused_layer_norm_cuda")
    fused = sys.modules["apex.normalization.fused_layer_norm"]
    vars(fused)["fused_layer_norm_affine"] = fused_layer_norm_affine
    model = ref.build_model(ref.PRE_LN, ParallelLayout(), seed=0, norm_backend=NormBackend.APEX)
    plain = ref.build_model(ref.PRE_LN, ParallelLayout(), seed=0)
    tokens = torch.arange(10).view(2, 5)
    same = torch.equal(model(tokens), plain(tokens))
    return len(calls), same


def test_apex_computes_every_norm_when_chosen() -> None:
    assert run_ranks(1, _model_with_stand_in_apex) == [(2 * ref.PRE_LN.layers + 1, True)]


def test_torch_norm_equals_the_formula() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * weight + bias
    found = layers.norm_kernel(NormBackend.TORCH)(x, weight, bias, (8,), 1e-5)
    torch.testing.assert_close(found, expected)
