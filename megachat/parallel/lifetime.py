"""Gives what owns memory, groups, graphs or hooks an end that can be asked for: `Owner.close()`.

Python frees an object when the last reference to it is gone, which for models, optimizers and
recorded graphs is never certain: hooks, caches and tracebacks hold them. So whoever builds one ends
it, and what it held is free whoever still knows the object.
"""

from types import TracebackType
from typing import Self

from megachat.errors import PhaseError


class Owner:
    """Has an end: `close()`, the end of its `with` block, or that of who owns it in turn.

    An end frees what is this process's own and waits for no other rank, so that a rank that failed
    can end what it has while the others stand in a collective.
    """

    _is_closed = False

    def close(self) -> None:
        """Frees what it holds; may be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._end()

    def _end(self) -> None:
        """Does it, once."""
        raise NotImplementedError

    def check_open(self) -> None:
        """To be called before use.

        Raises:
            PhaseError: It was closed.
        """
        if self._is_closed:
            raise PhaseError(
                f"this {type(self).__name__} was closed and has given its memory back: build a new "
                "one"
            )

    def __enter__(self) -> Self:
        """Begins a block at whose end it closes."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes it, whatever happened."""
        self.close()
