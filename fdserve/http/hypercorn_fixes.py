"""Mendings of hypercorn 0.18's trio server, each with a test that shows the fault.

The dependency is pinned to 0.18 because of this module.
"""

from __future__ import annotations

import hypercorn.trio.run
from hypercorn.events import Event, Updated
from hypercorn.trio.tcp_server import TCPServer


class PromptlyClosingServer(TCPServer):
    """Lets go of a connection whose client is gone.

    Hypercorn's own goes on waiting for the keep-alive timeout after the client has closed an idle connection, and
    holds its file descriptor as long.
    """

    _client_is_gone = False

    async def _read_data(self) -> None:
        await super()._read_data()
        self._client_is_gone = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        """Pass the event on; no idle time begins for a client that is gone."""
        if not (self._client_is_gone and isinstance(event, Updated) and event.idle):
            await super().protocol_send(event)


def apply() -> None:
    """Have hypercorn's trio server use them."""
    # Where its `serve` looks the class up; the name is not one that the module exports.
    hypercorn.trio.run.TCPServer = PromptlyClosingServer  # type: ignore[attr-defined]
