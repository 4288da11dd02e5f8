"""Settings every test shares: one thread, CPU, quiet libraries."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

# Before DeepSpeed is imported, which asks for it then.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Draws of torch's own generator do not depend on which tests ran before in this process."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests for a GPU are skipped where there is none, before their fixtures are made."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
