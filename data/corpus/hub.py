"""Requests to the Hugging Face hub, with a timeout and clear errors."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils._http import default_client_factory

from configs.errors import UserError
from configs.schema import SourceConfig
from data.source_files import SourceKeys

_TIMEOUT_S = 30.0  # to connect, and between bytes; huggingface_hub has none for most requests
_REASONS: dict[type[Exception], str] = {
    errors.GatedRepoError: "the hub requires access to it; request access and run hf auth login",
    errors.RepositoryNotFoundError: (
        "the hub has no such repository, or it is private (hf auth login gives access)"
    ),
    errors.RevisionNotFoundError: "the hub has it, but not this revision",
    errors.HFValidationError: "it is not a valid repository name",
    errors.OfflineModeIsEnabled: "it is not cached, and HF_HUB_OFFLINE forbids downloads",
}


def commit_of(source: SourceConfig, keys: SourceKeys) -> str:
    """Return the commit of a hub dataset's revision; empty for a local folder."""
    if source.path is None or Path(source.path).is_dir():
        return ""
    with requests_to_hub(f"{keys.path}={source.path!r} cannot be read:"):
        api = huggingface_hub.HfApi()
        return api.dataset_info(source.path, revision=source.hub_revision).sha or ""


@contextlib.contextmanager
def requests_to_hub(what: str) -> Iterator[None]:
    """Set timeouts of requests; raise UserError, which begins with `what`, if one fails."""
    huggingface_hub.set_client_factory(_make_client)
    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]  # httpx's
        raise UserError(f"{what} {_reason(error)}") from error


def _make_client() -> Any:
    client = default_client_factory()
    client.event_hooks["request"].append(_limit_time)
    return client


def _limit_time(request: Any) -> None:
    """Set timeouts that the caller omitted or set to None, which means forever."""
    given = request.extensions.get("timeout", {})
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: given.get(kind) or _TIMEOUT_S for kind in kinds}


def _reason(error: BaseException) -> str:
    problem, root = "cannot be reached", error
    while True:
        for kind, reason in _REASONS.items():
            if isinstance(root, kind):
                return reason
        if isinstance(root, errors.HfHubHTTPError):
            problem = "answers with an error"
        if root.__cause__ is None:
            break
        root = root.__cause__
    line = str(root).strip().partition("\n")[0]
    return (
        f"the hub at {constants.ENDPOINT} {problem} ({type(root).__name__}: {line}); "
        "check the network and try again"
    )
