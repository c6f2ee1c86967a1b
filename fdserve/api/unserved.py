"""What to say about paths that clients know from elsewhere, and about near misses."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from difflib import get_close_matches

# The first segment of a path, after /v1 -> what it would be. From OpenAI's API, vLLM's and FastDeploy's.
_ELSEWHERE = {
    "embeddings": "Embeddings are",
    "images": "Image generation is",
    "videos": "Video generation is",
    "audio": "Speech and transcription are",
    "realtime": "The realtime API is",
    "moderations": "Moderation is",
    "files": "The files API is",
    "uploads": "The files API is",
    "fine_tuning": "Fine-tuning is",
    "fine-tuning": "Fine-tuning is",
    "fine-tunes": "Fine-tuning is",
    "batches": "The batch API is",
    "assistants": "The assistants API is",
    "threads": "The assistants API is",
    "vector_stores": "The vector store API is",
    "containers": "The containers API is",
    "conversations": "The conversations API is",
    "evals": "The evals API is",
    "edits": "The edits API is",
    "engines": "The engines API is",
    "organization": "The administration API is",
    "rerank": "Reranking is",
    "score": "Scoring is",
    "classify": "Classification is",
    "pooling": "Pooling is",
    "reward": "Rewards are",
}

# Paths below those that are served, after /v1 -> what to say of them.
_BELOW = [
    (re.compile(path, re.DOTALL), said)
    for path, said in (
        (
            "/responses/input_tokens",
            "Counting a response's tokens is not served here: POST /v1/chat/completions/render counts those of a chat.",
        ),
        (
            "/responses/compact",
            'Compaction is not served here: truncation "auto", at /v1/responses, leaves out the oldest turns.',
        ),
        (
            "/responses/[^/]+/cancel",
            "There are no background responses: POST /v1/requests/{id}/cancel ends one that is being answered.",
        ),
        (
            "/responses/[^/]+/input_items",
            "The items of a response's input are not served here: GET /v1/responses/{id} has those of its output.",
        ),
        ("/messages/batches(/.*)?", "The batch API is not served here: this server generates text, at /v1/messages."),
    )
]


def hints(paths: Collection[str]) -> Callable[[str], str]:
    """A function from an unknown path to a sentence that helps. `paths` are those that the server has."""
    known = {_bare(path): path for path in sorted(paths) if "{" not in path}

    def hint(path: str) -> str:
        bare = _bare(path)
        if bare in known and known[bare] != path:
            return f"Did you mean {known[bare]}?"
        if (said := unserved(path)) is not None:
            return said
        what = _ELSEWHERE.get(bare.partition("/")[2].partition("/")[0])
        if what is not None:
            return f"{what} not served here: this server generates text, at /v1/chat/completions."
        # A prefix too many, as behind a gateway or with a base URL that is a whole path; or a slip of the pen.
        ends = [end for end in known if bare.endswith(end)] or get_close_matches(bare, known, n=1, cutoff=0.85)
        return f"Did you mean {known[max(ends, key=len)]}?" if ends else "GET /openapi.json lists all that there are."

    return hint


def unserved(path: str) -> str | None:
    """A sentence about a path that OpenAI or Anthropic have below one of this server's; None for any other.

    Such a path may be a known one here, with another method: it reads like a response's.
    """
    bare = _bare(path)
    return next((said for pattern, said in _BELOW if pattern.fullmatch(bare)), None)


def _bare(path: str) -> str:
    """Without versions, superfluous slashes and capitals."""
    return re.sub(r"^(/+v\d+)*/+", "/", path[:200].rstrip("/").lower())
