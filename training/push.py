"""Uploading a Hub folder: what would go, and sending it."""

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

# HTTPError is httpx's or httpx2's, by the version of huggingface_hub; what its requests raise derives from it.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from fwd2bot.folder_fwd2bot import DRAFT

LEFT_OUT = (".git", ".cache", "__pycache__")  # folders that are no part of a model
# Weights of an earlier upload that the new one does not have, full beside adapter-only say, go.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "compress/*", "generate/*")


@dataclass
class Destination:
    """Where a folder goes.

    Args:
        repo: "name" or "owner/name" on the Hub. branch: None is main; one that is not there is made.
        private: of a repository that is made now; None leaves it to the owner's settings.
    """

    repo: str
    private: bool | None = None
    branch: str | None = None
    message: str = "Upload Fwd2Bot"


def check_destination(to: Destination, sends: bool = True) -> None:
    """Raise `ValueError` for what would fail at the end of a long export; asks no server.

    Args:
        sends: whether anything will be sent, so that token and network are needed.
    """
    try:
        validate_repo_id(to.repo)
    except HFValidationError as error:
        raise ValueError(f"--push {to.repo!r} is no name of a repository ({error}); give owner/name") from error
    if not sends:
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or look with --dry-run")
    if get_token() is None:
        raise ValueError("there is no token of the Hub; run `hf auth login`, set HF_TOKEN, or look with --dry-run")


def files_to_push(folder: Path) -> list[Path]:
    """The files of a folder that would go, relative to it, in order."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part in LEFT_OUT or part.startswith(DRAFT) for part in relative.parts):
            found.append(relative)
    return found


def listing(folder: Path, to: Destination) -> str:
    """What `push` would send, and where, in words."""
    files = files_to_push(folder)
    sizes = [(folder / path).stat().st_size for path in files]
    kind = {None: "", True: ", private if it is made now", False: ", public if it is made now"}[to.private]
    where = f"{constants.ENDPOINT}/{to.repo}, branch {to.branch or constants.DEFAULT_REVISION}{kind}"
    lines = [f"{size:>15,}  {path.as_posix()}" for path, size in zip(files, sizes, strict=True)]
    return "\n".join(
        [
            f"{len(files)} files, {sum(sizes):,} bytes, would go to {where}, as {to.message!r}:",
            *lines,
            f"files there that match {', '.join(REPLACED)} and are not among these would be removed",
        ]
    )


def push(folder: Path, to: Destination) -> str:
    """Upload a folder as one commit and return its address; unchanged files are not sent again.

    Raises:
        ValueError: see `check_destination`. OSError: the Hub refused, or was not reached.
    """
    check_destination(to)
    api = HfApi()
    try:
        repo = api.create_repo(to.repo, private=to.private, exist_ok=True).repo_id
        if to.branch not in (None, constants.DEFAULT_REVISION):
            api.create_branch(repo, branch=to.branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=to.branch,
            commit_message=to.message,
            allow_patterns=[glob.escape(path.as_posix()) for path in files_to_push(folder)],
            delete_patterns=list(REPLACED),
        )
    except HfHubHTTPError as error:
        raise OSError(
            f"{constants.ENDPOINT} refused {to.repo}: {str(error).strip()} Check the name, and that the token of "
            "`hf auth whoami` may write there"
        ) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise OSError(
            f"{constants.ENDPOINT} was not reached ({error}). The folder {os.fspath(folder)} is complete; push it "
            "again when the network is back"
        ) from error
    return commit.commit_url
