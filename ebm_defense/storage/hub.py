"""Defenses on the Hugging Face Hub: `hf://owner/name` or `hf://owner/name@revision`.

Everything that is asked of the Hub goes through huggingface_hub, which keeps downloads in its cache
and knows who is logged in. `HF_ENDPOINT` names another server than the usual one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ebm_defense.errors import UsageError
from ebm_defense.runtime.optional import optional

SCHEME = "hf://"
FORM = f"{SCHEME}owner/name or {SCHEME}owner/name@revision"
PATTERNS = ("defense.toml", "SHA256SUMS", "*.safetensors", "README.md", "recipe.toml")
"""What of a repository is a defense; nothing else is downloaded or sent."""
CARD = "README.md"
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_ADDRESS = re.compile(rf"({_WORD}/{_WORD})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")


class Address(NamedTuple):
    """A repository `owner/name`, and the branch, tag or commit that was asked for."""

    repository: str
    revision: str | None = None


def is_address(spec: str | Path) -> bool:
    """Whether a name stands for a repository on the Hub."""
    return str(spec).startswith(SCHEME)


def address(spec: str) -> Address:
    """Read `hf://owner/name[@revision]`.

    Raises:
        UsageError: another form.
    """
    found = _ADDRESS.fullmatch(spec.removeprefix(SCHEME))
    if not is_address(spec) or found is None:
        raise UsageError(f"{spec!r} is no address on the Hub; write {FORM}.")
    return Address(found.group(1), found.group(2))


def download(spec: str, patterns: Sequence[str] = PATTERNS) -> Path:
    """Return a local folder with a repository's files, which are downloaded unless they are cached.

    Args:
        spec: hf://owner/name[@revision].
        patterns: of the files; those of a defense if not given.

    Raises:
        UsageError: another form, huggingface_hub is not installed, no such repository or revision,
            or no way to the Hub and nothing in the cache.
    """
    where, hub = address(spec), _library()
    with _explained(spec):
        return Path(
            hub.snapshot_download(
                where.repository,
                revision=where.revision,
                allow_patterns=list(patterns),
                endpoint=_endpoint(),
            )
        )


def upload(folder: Path, spec: str, *, private: bool = False, card: str | None = None) -> str:
    """Commit a defense folder to a repository, which is made if need be.

    Args:
        folder: its files of `PATTERNS` are sent.
        spec: where to; of a revision the branch, which is made too.
        private: whether a new repository is private.
        card: a model card for a folder that has none.

    Returns:
        The commit's address.

    Raises:
        UsageError: another form, huggingface_hub is not installed, nobody is logged in who may
            write there, or no way to the Hub.
    """
    where, hub = address(spec), _library()
    api = hub.HfApi(endpoint=_endpoint())
    files = [p for pattern in PATTERNS for p in sorted(folder.glob(pattern))]
    parts = {p.name: p for p in files}
    contents: dict[str, Any] = parts | ({CARD: card.encode()} if card and CARD not in parts else {})
    adds = [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in contents.items()
    ]
    with _explained(spec):
        api.create_repo(where.repository, private=private, exist_ok=True)
        if where.revision:
            api.create_branch(where.repository, branch=where.revision, exist_ok=True)
        made = api.create_commit(
            where.repository,
            operations=adds,
            commit_message="Publish a defense",
            revision=where.revision,
        )
    return str(made.commit_url)


def _library() -> Any:
    return optional("huggingface_hub", "huggingface_hub", "hub")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")


@contextmanager
def _explained(spec: str) -> Iterator[None]:
    """Say in one sentence what the Hub, or the way to it, refused."""
    errors = optional("huggingface_hub.errors", "huggingface_hub", "hub")
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{spec} has no such revision; leave it out, or name another.") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{spec} does not exist or is not yours to see; check the name, or run hf auth login."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "?")
        raise UsageError(
            f"the Hub refused {spec} (status {status}); run hf auth login with an account that "
            "may do this, or try again later."
        ) from error
    except Exception as error:  # the network fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UsageError(f"{spec} cannot be reached ({reason}).") from error
