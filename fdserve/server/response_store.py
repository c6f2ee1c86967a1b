"""The responses that previous_response_id and GET /v1/responses/{id} can find: in memory, within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

MAX_RESPONSES = 1024
MAX_BYTES = 64 << 20

_ID_BYTES = 256  # what an id takes in the index, about


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response's body, a list of the items that it was given, and those of its output by their ids: all are JSON."""

    body: bytes
    history: bytes
    output: Mapping[str, bytes]

    @property
    def conversation(self) -> tuple[bytes, ...]:
        """What a response that goes on from it is given."""
        return self.history, *self.output.values()

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return len(self.body) + sum(map(len, self.conversation)) + _ID_BYTES * len(self.output)


class ResponseStore:
    """Responses by id. Past a bound, the one that was used least recently goes."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self.size = 0
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._holders: dict[str, str] = {}  # an item's id -> the response that it came out in

    def __len__(self) -> int:
        return len(self._responses)

    def put(self, id: str, response: StoredResponse) -> None:
        """Keep a new response; one that is over the bound by itself is not kept."""
        if response.size > self._max_bytes:
            return
        self._responses[id] = response
        self.size += response.size
        self._holders.update(dict.fromkeys(response.output, id))
        while len(self._responses) > self._max_responses or self.size > self._max_bytes:
            self.delete(next(iter(self._responses)))

    def get(self, id: str) -> StoredResponse | None:
        """The response, which counts as used now."""
        response = self._responses.get(id)
        if response is not None:
            self._responses.move_to_end(id)
        return response

    def item(self, item_id: str) -> bytes | None:
        """The item, whose response counts as used now."""
        id = self._holders.get(item_id)
        response = None if id is None else self.get(id)
        return None if response is None else response.output[item_id]

    def delete(self, id: str) -> bool:
        """Forget the response; False if there is none."""
        response = self._responses.pop(id, None)
        if response is None:
            return False
        self.size -= response.size
        for item_id in response.output:
            del self._holders[item_id]
        return True
