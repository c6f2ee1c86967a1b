"""Where a model's files are: a directory, the hub's cache, or a download."""

from __future__ import annotations

from pathlib import Path

import msgspec

from fdserve.errors import StartupError
from fdserve.models.checkpoint import INDEX, SINGLE

DEMO = Path(__file__).parent / "demo" / "checkpoint"

# Weights as safetensors and what describes them. Pickled weights and code are never fetched.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt"]


def resolve_model(name: str) -> Path:
    """The directory of a model: the bundled demo for "", a local directory, else a hub repository "owner/name".

    A complete copy in the hub's cache is taken as it is; otherwise the repository is downloaded with a progress
    bar, which blocks for as long as it takes. HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are respected.
    Raises StartupError.
    """
    if not name:
        if not DEMO.is_dir():
            raise StartupError("the bundled demo checkpoint is missing from this installation: give a --model.")
        return DEMO
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise StartupError(f"--model {name} is a file: give the directory that holds the checkpoint.")
    except OSError as error:  # a directory above it that cannot be searched, or too long a name
        raise StartupError(f"--model {name:.200}: {error.strerror}.") from None
    except RuntimeError:
        pass  # nobody has the home directory that it begins with
    if not _looks_like_repository(name):
        or_hub = "" if name[0] in "./~" else ", and it is no hub name such as baidu/ERNIE-4.5-0.3B-Paddle"
        raise StartupError(f"--model {name:.200}: there is no such directory{or_hub}.")
    return _cached(name) or _download(name)


def _looks_like_repository(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part and part[0] not in ".~" for part in parts)


def _snapshot(name: str, *, local_files_only: bool) -> Path:
    # Imported here: it takes a while, and a local directory needs none of it.
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(name, allow_patterns=_PATTERNS, ignore_patterns=["*/*"], local_files_only=local_files_only)
    )


def _cached(name: str) -> Path | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        directory = _snapshot(name, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    except ValueError as error:  # not a repository's name
        raise StartupError(f"--model {name} is neither a directory nor a repository's name: {_line(error)}") from None
    except RuntimeError:  # a user that the system has no entry for, as in a container
        raise StartupError(f"--model {name}: there is no home directory for the hub's cache: set HF_HOME.") from None
    return directory if _complete(directory) else None


def _complete(directory: Path) -> bool:
    """Whether an earlier download got all that a start needs; one that was interrupted goes on where it stopped."""
    tokenizer = any(directory.glob("tokenizer.*")) or any(directory.glob("*.model"))
    return tokenizer and (directory / "config.json").is_file() and _has_weights(directory)


def _has_weights(directory: Path) -> bool:
    """Like the loader, which prefers the single file to an index."""
    if (directory / SINGLE).is_file():
        return True
    try:
        weight_map = msgspec.json.decode((directory / INDEX).read_bytes())["weight_map"]
        shards = set(weight_map.values())
        return bool(shards) and all((directory / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _download(name: str) -> Path:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return _snapshot(name, local_files_only=False)
    except GatedRepoError:
        problem = "its owner grants access to it: ask for it on the hub and set HF_TOKEN."
    except RepositoryNotFoundError:
        problem = "the hub has no such repository, or it is private: check the name, or set HF_TOKEN."
    except LocalEntryNotFoundError:
        problem = (
            "it is not in the cache and the hub cannot be reached: check the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
            "or give a local directory."
        )
    except Exception as error:  # whatever the network and the disk can do
        problem = f"the download failed: {_line(error)}"
    raise StartupError(f"--model {name}: {problem}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
