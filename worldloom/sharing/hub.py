"""Agents on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from worldloom.extras import how_to_install
from worldloom.families import FAMILIES, load_agent
from worldloom.family import installed
from worldloom.locations import Location
from worldloom.pretrained import read_description
from worldloom.sharing.card import ModelCard
from worldloom.sharing.directory import PARTS, save_agent
from worldloom.types import Agent


def push_to_hub(
    agent: Agent | Location,
    repo_id: str,
    *,
    card: ModelCard | None = None,
    licence: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload an agent with its model card to the Hugging Face Hub; return the commit, a revision for `from_hub`.

    agent, card, licence: as `save_agent` takes them. repo_id: owner/name; it is made if it does not exist. revision:
    the branch, main by default. token: by default that of `hf auth login`, or $HF_TOKEN. Raises the errors of
    `save_agent`; ValueError for a name that the Hub does not allow; PermissionError if it refuses; ConnectionError
    without it; ImportError, which names the extra, without huggingface_hub.
    """
    hub = _hub()
    hub.utils.validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="worldloom-") as folder:
        save_agent(agent, folder, card=card, licence=licence, repo_id=repo_id)
        with _as_sentences(hub, "push_to_hub", repo_id, revision):
            api = hub.HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            made = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=message or "Upload an agent of WorldLoom",
            )
    return str(made.oid)


def from_hub(
    repo_id: str,
    revision: str | None = None,
    *,
    filename: str | None = None,
    device: torch.device | str = "cpu",
    token: str | None = None,
    **settings: Any,
) -> Agent:
    """Load an agent from the Hugging Face Hub.

    revision: a commit, tag or branch, main by default; a commit makes it the same weights for ever. filename: a file
    there that a family's authors published, in place of a directory of `push_to_hub`. device, settings: as `load_agent`
    takes them. Nothing that is downloaded is executed. Raises FileNotFoundError for what is not there, the errors of
    `load_agent`, ConnectionError without the Hub, and ImportError without huggingface_hub.
    """
    hub = _hub()
    with _as_sentences(hub, "from_hub", repo_id, revision):
        if filename is not None:
            place = hub.hf_hub_download(repo_id, filename, revision=revision, token=token)
        else:
            place = hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(PARTS), token=token)
    if filename is None:
        _check_known(repo_id, str(read_description(place).get("family")))
    return load_agent(place, device, **settings)


def _check_known(repo_id: str, family: str) -> None:
    """Raise ValueError for a family that would have to be imported first, since what is downloaded names it."""
    if family not in FAMILIES and family not in installed() and family not in sys.modules:
        raise ValueError(
            f"{repo_id} holds an agent of family {family!r}, which is none of {', '.join(FAMILIES)}. If you know that "
            "module, import it first."
        )


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise ImportError(how_to_install("huggingface_hub")) from error
    return huggingface_hub


@contextlib.contextmanager
def _as_sentences(hub: Any, who: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Raise the Hub's errors as a sentence that names the repository."""
    where = repo_id if revision is None else f"{repo_id} at {revision}"
    errors = hub.errors
    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(f"{who}: the Hub does not answer, and {where} was not loaded here before.") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{who}: {where} is not on the Hub, or not for you. Check the name, or log in with: hf auth login"
        ) from error
    except errors.HfHubHTTPError as error:
        raise PermissionError(f"{who}: the Hub refuses {where}: {error}. Log in with: hf auth login") from error
    except Exception as error:
        if not _unreachable(error):
            raise
        raise ConnectionError(f"{who}: the Hub does not answer: {error or type(error).__name__}.") from error


def _unreachable(error: Exception) -> bool:
    """Return whether the Hub was not reached. Which package carries its requests depends on the Hub's own version."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"TransportError", "ConnectionError", "Timeout"})
