"""The one place that makes other libraries' errors fit into one line."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip() if text else type(error).__name__
