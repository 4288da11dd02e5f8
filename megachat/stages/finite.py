"""Says in which stage and step of a run a number was none: `at`, `require_figures`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megachat.errors import DivergenceError
from megachat.ops.finite import require_number


@contextmanager
def at(place: str) -> Iterator[None]:
    """A block whose divergence is told with its place, such as "sft step 3".

    Raises:
        DivergenceError: That of the block.
    """
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(f"{place}: {error}") from error


def require_figures(figures: Mapping[str, float | None], *, of: str) -> None:
    """Refuses figures of which one is NaN or infinite; None stands for one that does not exist.

    Args:
        figures: By name, equal on all ranks.
        of: Whose they are.

    Raises:
        DivergenceError: Names the first.
    """
    for name, value in figures.items():
        if value is not None:
            require_number(value, what=f"{name.replace('_', ' ')} of {of}")
