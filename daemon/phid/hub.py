"""The Hugging Face Hub: what a repository has at a revision, and its files' bytes from any place.

huggingface_hub brings endpoint, token, session and errors. The bytes are read here: its own
downloads (2.4) go to a file of a new name each time, which is removed when they fail, so that
nothing of a killed one could be used again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus

# Set before the import, which reads them. They turn off Xet, another transport with a cache of its
# own, and whatever tells others of us.
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Documented there, and not marked as exported.
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
)

from phid import __version__

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_LOGIN = "set HF_TOKEN to a token that may read it"


class HubError(Exception):
    """The Hub cannot give it, now or ever; the message says why and how to mend it."""


class Interrupted(Exception):  # noqa: N818 - it is no fault of ours, and is tried again
    """The connection, or the server, failed for now; `wait_s` is what the server asks for."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class Changed(Exception):  # noqa: N818 - as Interrupted
    """The server has the file in another form than before: what is here of it is of no use."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the repository: `sha256` where it is a large one, else git's own `blob` hash."""

    path: str
    bytes: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]


def endpoint() -> str:
    """Where the Hub is: HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or str(constants.ENDPOINT)


def offline() -> bool:
    """True where nothing may be fetched: HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES


def look(repo: str, revision: str, *, timeout_s: float) -> Snapshot:
    """What the repository has at a commit or branch. Raises HubError or Interrupted."""
    api = HfApi(endpoint(), library_name="phid", library_version=__version__)
    try:
        with _in_words(f"{repo} at {revision}"):
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout_s)
    except HFValidationError:
        raise HubError(f"{repo!r}: a repository is called OWNER/NAME ([[catalog]] repo)") from None
    if not info.sha:
        raise HubError(f"{endpoint()} does not say which commit {repo} is at: is it a Hub?")
    files = []
    for sibling in info.siblings or ():
        size = sibling.lfs.size if sibling.lfs else sibling.size
        if size is None:
            raise HubError(f"{endpoint()} does not say how large {sibling.rfilename} is")
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        blob = None if sibling.lfs else sibling.blob_id
        files.append(RemoteFile(sibling.rfilename, size, sha256, blob))
    return Snapshot(repo, info.sha, tuple(files))


@contextmanager
def bytes_from(
    snapshot: Snapshot, file: RemoteFile, offset: int, etag: str | None, *, timeout_s: float
) -> Iterator[tuple[str | None, Iterator[bytes]]]:
    """The file's ETag and its bytes from `offset` on, as they come.

    `etag` is that of the bytes already here: Changed is raised if it is another by now, or if the
    server sends the file from its beginning. Raises HubError or Interrupted, here or while they
    are read.
    """
    url = hf_hub_url(snapshot.repo, file.path, revision=snapshot.commit, endpoint=endpoint())
    headers = build_hf_headers(library_name="phid", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # offsets are those of the file's own bytes
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if etag is not None:
            headers["If-Range"] = etag
    with (
        _in_words(file.path),
        get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response,
    ):
        if offset and response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise Changed(f"{file.path} is shorter than what is here of it")
        hf_raise_for_status(response)
        commit = response.headers.get("X-Repo-Commit")
        if commit is not None and commit != snapshot.commit:
            raise HubError(
                f"{endpoint()} sent {file.path} of commit {commit} where {snapshot.commit} was"
                " asked for: pull again, from another endpoint if it stays so"
            )
        if offset and response.status_code != HTTPStatus.PARTIAL_CONTENT:
            raise Changed(f"the server sends {file.path} from its beginning")
        if offset and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise Changed(f"the server sends another part of {file.path}")
        yield _strong(response.headers.get("ETag")), response.iter_raw()


def _strong(etag: str | None) -> str | None:
    """Only a strong ETag says that the bytes are the same (RFC 9110, 13.1.5)."""
    return None if etag is None or etag.startswith("W/") else etag


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Put whatever the libraries raise into our two kinds, and one line each."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError(f"HF_HUB_OFFLINE is set, and {what} is not here: unset it") from None
    except GatedRepoError:
        raise HubError(
            f"{what}: its owner wants its licence accepted first: do so at {endpoint()}, and"
            f" {_LOGIN}"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{what}: there is no such revision") from None
    except RemoteEntryNotFoundError:
        raise HubError(f"{what}: there is no such file at that commit") from None
    except RepositoryNotFoundError:
        raise HubError(f"{what}: there is no such repository, or it is private: {_LOGIN}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in _TRANSIENT:
            wait_s = _retry_after_s(error.response.headers.get("Retry-After"))
            raise Interrupted(f"{what}: the server says {status}", wait_s) from None
        mend = _LOGIN if status in (401, 403) else f"check HF_ENDPOINT ({endpoint()})"
        raise HubError(f"{what}: the server says {status}: {mend}") from None
    except httpx2.HTTPError as error:
        words = str(error).partition("\n")[0]
        raise Interrupted(f"{what}: {type(error).__name__} {words}".strip()) from None
    except httpx2.InvalidURL as error:
        raise HubError(f"HF_ENDPOINT is no address ({error}): such as https://host") from None


def _retry_after_s(text: str | None) -> float | None:
    """Seconds; a date, which is allowed too, counts as nothing said."""
    return float(text) if text and text.strip().isdecimal() else None
