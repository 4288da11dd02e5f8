"""Settings every test shares: one thread, CPU, quiet libraries."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:  # as under nohup: tests are about being told
        signal.signal(_number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.kernels.proven import Recorder  # noqa: E402

# Before DeepSpeed is imported, which asks for it then.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-faults",
        action="store_true",
        help="put every fault into the kernels, not one into each, and show all of them to nvcc; "
        "records in tests/kernels/proven.json that it was done",
    )
    parser.addoption(
        "--campaign",
        type=int,
        metavar="DRAWS",
        help="how many bad inputs tests/e2e/test_campaign.py draws, where not its few",
    )


def pytest_configure(config: pytest.Config) -> None:
    """One process of a session writes the record, from what it hears of all tests."""
    if config.getoption("all_faults") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Draws of torch's own generator do not depend on which tests ran before in this process."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests for a GPU are skipped where there is none, before their fixtures are made."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
