"""Hugging Face's hub, or one that speaks as it does (HF_ENDPOINT), through huggingface_hub's public API.

Large files go by Xet, where chunks that the hub has are not sent again, or by LFS (HF_HUB_DISABLE_XET=1), where whole
files are not. The token is the library's own: HF_TOKEN, or what `hf auth login` stored.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, logging, validate_repo_id  # type: ignore[attr-defined]

from export.hub import TITLE, Changes, Holding, Listed, Listing, Remote, RemoteFile, Temporary
from suite.errors import SuiteError

MAY_PASS = (408, 409, 412, 423, 429, 500, 502, 503, 504)
"""Statuses of a hub that is busy, or whose branch has moved."""
OFFLINE = "HF_HUB_OFFLINE is set, so no hub is asked"
UNSET = "unset it, or use what is on this machine"
AT_ONCE = 4
"""Files that are fetched at the same time."""
LOG_IN = "export HF_TOKEN=..., or: hf auth login"


class HuggingFace:
    """One branch of a repository; only those of models are pushed to."""

    def __init__(self, repository: str, branch: str = "", holding: Holding = "model") -> None:
        self.repository, self.branch = repository, branch or constants.DEFAULT_REVISION
        self.holding = holding
        self.page = f"datasets/{repository}" if holding == "dataset" else repository
        self.api = HfApi()
        self.url = f"{self.api.endpoint}/{self.page}"
        disable_progress_bars()

    def check(self) -> None:
        """Whether a push could begin: a name the hub allows, a token, no offline mode."""
        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise SuiteError(str(error)) from None
        if constants.is_offline_mode():
            raise SuiteError(OFFLINE, hint=UNSET)
        if not get_token():
            raise SuiteError("there is no token for Hugging Face", hint=LOG_IN)

    def look(self) -> Remote | None:
        """What the branch holds; None without it."""
        with explained(self.repository):
            try:
                info = self.api.model_info(self.repository, revision=self.branch)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                self.api.whoami()  # a refused token looks the same as a missing repository, but not to this
                return None
            tree = self.api.list_repo_tree(self.repository, recursive=True, expand=True, revision=info.sha)
            files = {file.path: _described(file) for file in tree if isinstance(file, RepoFile)}
            return Remote(str(info.sha), bool(info.private), files)

    def create(self, *, public: bool) -> None:  # noqa: ARG002
        """Hidden at first even if it shall be public: nobody sees it half full."""
        with explained(self.repository):
            self.api.create_repo(self.repository, private=True, exist_ok=True)
            if self.branch != constants.DEFAULT_REVISION:
                self.api.create_branch(self.repository, branch=self.branch, exist_ok=True)

    def send(self, folder: Path, changes: Changes, there: Remote, title: str) -> None:
        """Send and remove; the card is checked by the hub first. How far it is stands in the log, twice a minute."""
        logging.set_verbosity_info()  # type: ignore[no-untyped-call]
        with explained(self.repository):
            self.api.upload_folder(
                repo_id=self.repository,
                folder_path=folder,
                revision=self.branch,
                commit_message=TITLE + title,
                parent_commit=there.commit,
                allow_patterns=[glob.escape(name) for name in changes.send],
                delete_patterns=[glob.escape(name) for name in changes.remove] or None,
            )

    def publish(self) -> None:
        """Make the repository public."""
        with explained(self.repository):
            self.api.update_repo_settings(self.repository, private=False)

    def listing(self, commit: str = "") -> Listing:
        """By git's ids, and the sha256 of large files."""
        kind = self.holding
        with explained(self.page):
            found = commit or str(self.api.repo_info(self.repository, repo_type=kind, revision=self.branch).sha)
            tree = self.api.list_repo_tree(self.repository, repo_type=kind, recursive=True, revision=found)
            files = {f.path: Listed(f.size, _described(f).digest) for f in tree if isinstance(f, RepoFile)}
        return Listing(found, files)

    def fetch(self, folder: Path, commit: str, files: Mapping[str, Listed]) -> None:
        """Several at once; the library notes beside them how far each is, and goes on from there."""

        def one(name: str) -> None:
            self.api.hf_hub_download(self.repository, name, repo_type=self.holding, revision=commit, local_dir=folder)

        with explained(self.page), ThreadPoolExecutor(AT_ONCE) as pool:
            for done in [pool.submit(one, name) for name in files]:
                done.result()


def _described(file: RepoFile) -> RemoteFile:
    title = file.last_commit.title if file.last_commit else ""
    return RemoteFile(file.lfs.sha256 if file.lfs else file.blob_id, title.startswith(TITLE))


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """Turns the library's errors into a `Temporary` or a SuiteError; none of them holds the token."""
    try:
        yield
    except Exception as error:
        raise _explanation(error, repository) from None


def _explanation(error: BaseException, repository: str) -> BaseException:
    if isinstance(error, OfflineModeIsEnabled):
        return SuiteError(OFFLINE, hint=UNSET)
    if isinstance(error, ValueError) and "README.md" in str(error):
        problems = str(error).partition("\n")[2].replace("- ", "").replace("\n", "; ")
        return SuiteError(f"the hub refuses the model card: {problems}", where="README.md")
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, repository)
        if isinstance(cause, httpx.TransportError | ConnectionError):
            return Temporary(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return error


def _refusal(error: HfHubHTTPError, repository: str) -> BaseException:
    if isinstance(error, GatedRepoError):
        return SuiteError(f"{repository} asks for its terms to be accepted", hint=f"on its page; then {LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return SuiteError(f"{repository} has no such commit, branch or tag")
    if isinstance(error, RepositoryNotFoundError):
        hint = f"if it is private: {LOG_IN}"
        return SuiteError(f"the hub has no repository {repository}, or shows it to others only", hint=hint)
    status, said = error.response.status_code, error.server_message or error.response.reason_phrase
    if status in MAY_PASS:
        return Temporary(f"the hub answered {status}: {said}")
    if status == 401:
        return SuiteError("the hub does not accept the token", hint=LOG_IN)
    if status == 403:
        hint = "the token needs the right to do this there; `hf auth whoami` says whose it is"
        return SuiteError(f"no permission for {repository}: {said}", hint=hint)
    return SuiteError(f"the hub answered {status}: {said}", where=repository)
