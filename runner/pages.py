"""Pages, and which of them are free. No torch."""

from collections.abc import Iterable


class PagePool:
    """Pages 0 .. total - 1. The pages that were freed last are handed out first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` pages, in any order; None, and nothing taken, if fewer are free."""
        if count > len(self._free):
            return None
        return tuple(self._free.pop() for _ in range(count))

    def free(self, pages: Iterable[int]) -> None:
        """Give `pages` back."""
        given = tuple(pages)
        assert len(self._free) + len(given) <= self.total, "a page was freed twice"
        self._free.extend(given)
