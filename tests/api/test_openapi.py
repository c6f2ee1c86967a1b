"""The description of the API, against itself and against what the server does."""

from __future__ import annotations

from typing import Any

import jsonschema
import msgspec
import pytest

from fdserve.api.openapi import Description
from fdserve.config import Config
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.http.router import Route
from tests.http.client import serving
from tests.http.fake_engine import FakeEngine, broken

pytestmark = pytest.mark.anyio


async def document(config: Config | None = None) -> dict[str, Any]:
    async with serving(config=config) as client:
        response = await client.get("/openapi.json")
        assert (response.status, response.headers["content-type"]) == (200, "application/json")
        content: dict[str, Any] = response.json()
        return content


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # seconds of work, and the same on either loop
async def test_every_reference_leads_somewhere() -> None:
    whole = await document()
    found = references(whole)
    assert len(found) > 20
    for reference in found:
        value = whole
        for name in reference.removeprefix("#/").split("/"):
            value = value[name]
        assert value
    for schema in whole["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


async def test_every_operation_says_what_it_does() -> None:
    whole = await document()
    operations = [operation for path in whole["paths"].values() for operation in path.values()]
    assert len(operations) >= 16
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert operation["summary"]
        assert {"200", "500", "503"} <= operation["responses"].keys()
        if "requestBody" in operation:
            assert {"400", "408", "413", "415"} <= operation["responses"].keys()
    stored = whole["paths"]["/v1/responses/{id}"]
    assert "400" in stored["get"]["responses"]
    assert "400" not in stored["delete"]["responses"]


async def test_the_servers_answers_follow_it() -> None:
    async with serving(FakeEngine(), Config(enable_logprob=True)) as client:
        whole = (await client.get("/openapi.json")).json()

        def check(name: str, value: Any) -> None:
            schema = {"$ref": f"#/components/schemas/{name}", "components": whole["components"]}
            jsonschema.Draft202012Validator(schema).validate(value)

        check("ChatCompletion", (await client.chat(logprobs=True, top_logprobs=2, return_token_ids=True)).json())
        for event in (await client.chat(logprobs=True, stream=True, stream_options={"include_usage": True})).events:
            check("ChatChunk", event)
        check("Completion", (await client.complete(logprobs=1)).json())
        for event in (await client.complete(logprobs=1, stream=True)).events:
            check("Completion", event)
        check("ModelList", (await client.get("/v1/models")).json())
        check("Load", (await client.get("/load")).json())
        check("ErrorBody", (await client.chat(messages=[])).json())
        client.engine.script = broken("half")
        check("ErrorBody", (await client.chat(stream=True)).events[-1])
        with pytest.raises(jsonschema.ValidationError):
            check("ChatCompletion", (await client.get("/load")).json())


async def test_what_is_always_sent_is_required() -> None:
    schemas = (await document())["components"]["schemas"]
    assert set(schemas["Load"]["required"]) == set(schemas["Load"]["properties"])
    always = {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert always == set(schemas["ChatCompletion"]["required"])
    assert "stop_reason" in schemas["ChatChunkChoice"]["properties"]
    assert "stop_reason" not in schemas["ChatChunkChoice"]["required"]
    assert schemas["ChatRequest"]["properties"]["temperature"]["default"] is None
    assert "temperature" not in schemas["ChatRequest"]["required"]


async def test_keys() -> None:
    whole = await document()
    assert "securitySchemes" not in whole["components"]
    assert "401" not in whole["paths"]["/v1/models"]["get"]["responses"]
    whole = await document(Config(api_key="secret"))
    assert whole["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert whole["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "401" in whole["paths"]["/v1/models"]["get"]["responses"]
    assert "security" not in whole["paths"]["/health"]["get"]


async def test_unions_parameters_and_descriptions() -> None:
    class Cat(msgspec.Struct):
        """Says
        little."""

        lives: int = 9

    class Dog(msgspec.Struct):
        name: str

    async def pet(request: Request, reply: Reply) -> None:
        """Pet it; gently. More."""

    routes = [Route("PUT", "/pets/{id}/on/{where:path}", pet, body=Cat | Dog, answer=Dog, events=Cat | Dog)]
    whole = Description(routes, keys=False).document()
    operation = whole["paths"]["/pets/{id}/on/{where}"]["put"]
    assert (operation["operationId"], operation["summary"]) == ("put_pets_id_on_where", "Pet it")
    assert [parameter["name"] for parameter in operation["parameters"]] == ["id", "where"]
    assert "404" in operation["responses"]
    either = {"anyOf": [{"$ref": "#/components/schemas/Cat"}, {"$ref": "#/components/schemas/Dog"}]}
    assert operation["requestBody"]["content"]["application/json"]["schema"] == either
    content = operation["responses"]["200"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/Dog"}
    assert set(content) == {"application/json", "text/event-stream"}
    assert whole["components"]["schemas"]["Cat"]["description"] == "Says\nlittle."
    assert whole["components"]["schemas"]["Cat"]["required"] == []
