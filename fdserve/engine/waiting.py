"""The queue of sequences that wait for a row and blocks."""

from __future__ import annotations

import heapq

from fdserve.engine.sequence import Sequence


class WaitingQueue:
    """Waiting sequences by priority and arrival; `len` counts those that have not finished.

    Sequences finish anywhere in it: they are dropped once they come to the head, or are most of what is kept.
    """

    def __init__(self) -> None:
        self._heap: list[Sequence] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, sequence: Sequence) -> None:
        """Put a sequence at its place."""
        heapq.heappush(self._heap, sequence)
        self._num_waiting += 1

    def first(self) -> Sequence | None:
        """The sequence that is next, or None. It stays in the queue until `pop`."""
        return self._heap[0] if self._heap else None

    def pop(self) -> None:
        """Take out the first one."""
        heapq.heappop(self._heap)
        self._num_waiting -= 1
        self._drop_finished()

    def note_finished(self) -> None:
        """One of those that wait has finished."""
        self._num_waiting -= 1
        self._drop_finished()

    def check_integrity(self) -> None:
        """Raise AssertionError if the sequences are counted wrongly."""
        if self._num_waiting != sum(sequence.finish_reason is None for sequence in self._heap):
            raise AssertionError("the number of waiting sequences is wrong")

    def _drop_finished(self) -> None:
        heap = self._heap
        while heap and heap[0].finish_reason is not None:
            heapq.heappop(heap)
        if len(heap) > 2 * self._num_waiting + 16:
            self._heap = [sequence for sequence in heap if sequence.finish_reason is None]
            heapq.heapify(self._heap)
