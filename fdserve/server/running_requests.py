"""The requests that are being answered, and how a client cancels one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class RunningRequests:
    """The requests that are being answered, by the names that a client may cancel them by.

    Clients choose some of the names, so several requests may share one; to cancel it cancels them all.
    """

    def __init__(self) -> None:
        self._cancels: dict[str, list[Callable[[], None]]] = {}

    @contextmanager
    def register(self, ids: Iterable[str], cancel: Callable[[], None]) -> Iterator[None]:
        """Inside the block, the request can be cancelled by each of the ids.

        `cancel` must not wait, and may be called more than once. Its request then ends with RequestCancelled.
        """
        names = set(ids)
        for name in names:
            self._cancels.setdefault(name, []).append(cancel)
        try:
            yield
        finally:
            for name in names:
                self._cancels[name].remove(cancel)
                if not self._cancels[name]:
                    del self._cancels[name]

    def cancel(self, id: str) -> bool:
        """Cancel what runs under this id; False if nothing does."""
        cancels = list(self._cancels.get(id, ()))
        for cancel in cancels:
            cancel()
        return bool(cancels)
