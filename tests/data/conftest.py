import pytest

from megachat.data.tokenizer import Tokenizer
from tests.data.samples import train_tiny


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tiny vocabulary without a beginning of sequence."""
    return train_tiny(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def opt_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tiny vocabulary that starts sequences with `</s>`, as OPT does."""
    return train_tiny(tmp_path_factory.mktemp("opt_like"), bos_token="</s>", add_bos=True)
