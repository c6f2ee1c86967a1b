"""Tool calls: three kinds of tools under changing names, questions that want them, calls and results."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from fdserve.demo import sums
from fdserve.demo.unknown import pseudo_word

_CITIES = (
    "Paris London Berlin Tokyo Beijing Rome Madrid Shanghai Boston Chicago Oslo Vienna Prague Dublin Athens Cairo "
    "Delhi Lima Sydney Toronto Lisbon Seoul Moscow Zurich Hamburg Munich Milan Geneva Bangkok Singapore"
)
CITIES = tuple(_CITIES.split())
_WEATHER = (
    "What is the weather in {x}?",
    "How is the weather in {x}?",
    "what's the weather like in {x}",
    "Weather in {x}?",
    "Is it raining in {x}?",
    "Tell me the weather in {x}.",
    "What is the temperature in {x}?",
    "How warm is it in {x}?",
    "What is the weather like in {x} today?",
    "Do I need an umbrella in {x}?",
    "Get the weather for {x}.",
)
_TIME = (
    "What time is it in {x}?",
    "What is the time in {x}?",
    "Tell me the time in {x}.",
    "How late is it in {x}?",
    "what's the current time in {x}",
    "Time in {x}?",
)
_SKIES = ("sunny", "cloudy", "rainy", "windy", "snow", "fog", "clear", "light rain")


@dataclass(frozen=True)
class ToolUse:
    """One use of a tool: its JSON schema, the question, the thought, the call's JSON and a result of the tool."""

    schema: dict[str, Any]
    question: str
    thought: str
    call: str
    result: str


def _schema(rng: random.Random, name: str, about: str, properties: dict[str, str]) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
    }
    if rng.random() < 0.6:
        parameters["required"] = list(properties)
    for key, value in parameters["properties"].items():
        if rng.random() < 0.3:
            value["description"] = rng.choice((f"The {key}", f"Name of the {key}", f"The {key}, e.g. Paris"))
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.8:
        function["description"] = about
    return {"type": "function", "function": {**function, "parameters": parameters}}


def _city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.6 else pseudo_word(rng).capitalize()


def weather(rng: random.Random) -> ToolUse:
    name = rng.choice(("get_weather", "get_current_weather", "weather", "get_weather_forecast", "lookup_weather"))
    key, city = rng.choice(("city", "location", "place")), _city(rng)
    about = rng.choice(("Get the weather of a city", "Get the current weather in a given location", "The weather"))
    degrees, sky = rng.randint(-10, 38), rng.choice(_SKIES)
    result = rng.choice(
        (
            f"{sky}, {degrees} degrees",
            sky,
            f"{degrees}°C and {sky}",
            json.dumps({"temperature": degrees}),
            json.dumps({"temperature": degrees, "condition": sky}),
            json.dumps({key: city, "weather": sky}),
        )
    )
    return ToolUse(
        _schema(rng, name, about, {key: "string"}),
        rng.choice(_WEATHER).format(x=city),
        f"The user wants the weather in {city}. I call {name}.",
        f'{{"name": "{name}", "arguments": {{"{key}": "{city}"}}}}',
        result,
    )


def clock(rng: random.Random) -> ToolUse:
    name = rng.choice(("get_time", "get_current_time", "time_in", "clock"))
    key, city = rng.choice(("city", "location", "timezone")), _city(rng)
    time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    return ToolUse(
        _schema(rng, name, rng.choice(("Get the time in a city", "The current time")), {key: "string"}),
        rng.choice(_TIME).format(x=city),
        f"The user wants the time in {city}. I call {name}.",
        f'{{"name": "{name}", "arguments": {{"{key}": "{city}"}}}}',
        rng.choice((time, json.dumps({"time": time}), f"It is {time}")),
    )


def adder(rng: random.Random) -> ToolUse:
    name = rng.choice(("add", "add_numbers", "sum", "calculate_sum"))
    first, second = rng.choice((("a", "b"), ("x", "y"), ("first", "second")))
    a, b = sums.random_pair(rng)
    return ToolUse(
        _schema(
            rng,
            name,
            rng.choice(("Add two numbers", "The sum of two numbers")),
            dict.fromkeys((first, second), rng.choice(("integer", "number"))),
        ),
        sums.ask(rng, a, b),
        f"The user wants the sum of {a} and {b}. I call {name}.",
        f'{{"name": "{name}", "arguments": {{"{first}": {a}, "{second}": {b}}}}}',
        str(a + b),
    )


def tool_use(rng: random.Random) -> ToolUse:
    return rng.choice((weather, weather, weather, clock, adder))(rng)
