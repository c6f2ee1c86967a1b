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


def hints(paths: Collection[str]) -> Callable[[str], str]:
    """A function from an unknown path to a sentence that helps. `paths` are those that the server has."""
    known = {_bare(path): path for path in sorted(paths) if "{" not in path}

    def hint(path: str) -> str:
        bare = _bare(path)
        if bare in known and known[bare] != path:
            return f"Did you mean {known[bare]}?"
        what = _ELSEWHERE.get(bare.partition("/")[2].partition("/")[0])
        if what is not None:
            return f"{what} not served here: this server generates text, at /v1/chat/completions."
        # A prefix too many, as behind a gateway or with a base URL that is a whole path; or a slip of the pen.
        ends = [end for end in known if bare.endswith(end)] or get_close_matches(bare, known, n=1, cutoff=0.85)
        return f"Did you mean {known[max(ends, key=len)]}?" if ends else "GET /openapi.json lists all that there are."

    return hint


def _bare(path: str) -> str:
    """Without versions, superfluous slashes and capitals."""
    return re.sub(r"^(/+v\d+)*/+", "/", path[:200].rstrip("/").lower())
