"""HTTP over ASGI: routing, bodies under a limit, OpenAI's errors, server-sent events. It knows no model."""
