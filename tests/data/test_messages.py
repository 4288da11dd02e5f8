import pytest

from megachat.data.messages import first_line


@pytest.mark.parametrize(
    ("text", "line"), [("\n one \n two", "one"), ("", "ValueError"), ("  ", "ValueError")]
)
def test_first_line_of_an_error(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line
