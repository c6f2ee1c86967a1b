"""The responses that previous_response_id and GET /v1/responses/{id} can find: in memory, within bounds."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MAX_RESPONSES = 1024
MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response's body, and its whole conversation as input items: both are JSON."""

    body: bytes
    items: bytes

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return len(self.body) + len(self.items)


class ResponseStore:
    """Responses by id. Past a bound, the one that was used least recently goes."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self.size = 0
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()

    def __len__(self) -> int:
        return len(self._responses)

    def put(self, id: str, response: StoredResponse) -> None:
        """Keep a new response; one that is over the bound by itself is not kept."""
        if response.size > self._max_bytes:
            return
        self._responses[id] = response
        self.size += response.size
        while len(self._responses) > self._max_responses or self.size > self._max_bytes:
            _, oldest = self._responses.popitem(last=False)
            self.size -= oldest.size

    def get(self, id: str) -> StoredResponse | None:
        """The response, which counts as used now."""
        response = self._responses.get(id)
        if response is not None:
            self._responses.move_to_end(id)
        return response

    def delete(self, id: str) -> bool:
        """Forget the response; False if there is none."""
        response = self._responses.pop(id, None)
        if response is not None:
            self.size -= response.size
        return response is not None
