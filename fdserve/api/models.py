"""GET /v1/models and GET /v1/models/{name}."""

from __future__ import annotations

from fdserve.errors import NotFound
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.protocol.models import Model, ModelList
from fdserve.server.server import Server


async def list_models(server: Server, request: Request, reply: Reply) -> None:
    """The one model that is served."""
    await reply.json(ModelList(data=[_model(server)]))


async def retrieve_model(server: Server, request: Request, reply: Reply) -> None:
    """The model by any of its names."""
    name = request.path_parameters["model"]
    check_model(server, name)
    await reply.json(_model(server))


def check_model(server: Server, name: str | None) -> None:
    """Raise NotFound unless a request may call the model so."""
    if name is not None and name not in server.model_names:
        message = f"The model '{name[:200]}' does not exist; this server has '{server.model_name}'."
        raise NotFound(message, param="model", code="model_not_found")


def _model(server: Server) -> Model:
    return Model(
        id=server.model_name,
        created=server.created,
        root=server.config.model or server.model_name,
        max_model_len=server.max_model_len,
    )
