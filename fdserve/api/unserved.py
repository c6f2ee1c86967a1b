"""What to say about paths that clients know from elsewhere, and about near misses."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

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


def hints(paths: Collection[str]) -> Callable[[str], str | None]:
    """A function from an unknown path to a sentence that helps, or None. `paths` are those that the server has."""

    def hint(path: str) -> str | None:
        bare = re.sub(r"^(/+v\d+)*/+", "/", path.rstrip("/").lower())
        for candidate in (f"/v1{bare}", bare):
            if candidate in paths and candidate != path:
                return f"Did you mean {candidate}?"
        what = _ELSEWHERE.get(bare.partition("/")[2].partition("/")[0])
        return f"{what} not served here: this server generates text, at /v1/chat/completions." if what else None

    return hint
