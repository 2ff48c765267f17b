"""ModelScope's hub (MODELSCOPE_ENDPOINT), through the public API of its library `modelscope-hub`, an optional extra.

Large files go by LFS, where whole files that the hub has are not sent again. The token is the library's own:
MODELSCOPE_API_TOKEN, or what `ms-hub login` stored. A repository there is private or public from its beginning: the
library cannot change that later.
"""

from __future__ import annotations

import glob
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from modelscope_hub import HubApi, HubConfig, Visibility
from modelscope_hub.errors import (
    AlreadyExistsError,
    AuthenticationError,
    HubError,
    NotExistError,
    PermissionDeniedError,
    StorageError,
)

from export.hf import CHECKSUMS, sha256, write_checksums
from export.hub import TITLE, Changes, Holding, Listed, Listing, Remote, RemoteFile, Temporary, listed
from suite.errors import SuiteError

MODEL = "model"
BRANCH = "master"
LOG_IN = "export MODELSCOPE_API_TOKEN=..., or: ms-hub login"


class ModelScope:
    """One branch of a repository; only those of models are pushed to."""

    def __init__(self, repository: str, branch: str = "", holding: Holding = "model") -> None:
        self.repository, self.branch, self.holding = repository, branch or BRANCH, holding
        self.config = HubConfig()
        self.api = HubApi(self.config)
        self.url = f"{self.config.endpoint}/{holding}s/{repository}"

    def check(self) -> None:
        """Whether a push could begin: a token."""
        if not self.config.token:
            raise SuiteError("there is no token for ModelScope", hint=LOG_IN)

    def look(self) -> Remote | None:
        """What the branch holds; None without it."""
        with explained(self.repository):
            try:
                info = self.api.get_repo(self.repository, MODEL)
                found = self.api.list_repo_files(self.repository, MODEL, revision=self.branch)
            except NotExistError:
                return None
            with tempfile.TemporaryDirectory() as folder:
                digests = {f.path: f.sha256 or sha256(self._download(f.path, folder)) for f in found if not f.is_dir}
                ours = listed(self._download(CHECKSUMS, folder).parent) if CHECKSUMS in digests else {}
            # a file that differs from the list of the last push was changed by others
            files = {path: RemoteFile(digest, ours.get(path) == digest) for path, digest in digests.items()}
            return Remote("", info.visibility != Visibility.PUBLIC, files)

    def _download(self, path: str, folder: str) -> Path:
        return Path(self.api.download_file(self.repository, MODEL, path, revision=self.branch, local_dir=folder))

    def listing(self, commit: str = "") -> Listing:
        """Of the branch as it is now: there are no commits to ask for, so the list itself must be the same."""
        with explained(self.repository):
            try:
                found = self.api.list_repo_files(self.repository, self.holding, revision=self.branch)
            except NotExistError:
                raise SuiteError(
                    f"ModelScope has no repository {self.repository} with '{self.branch}', or shows it to others only",
                    hint=f"if it is private: {LOG_IN}",
                ) from None
        files = {f.path: Listed(f.size, f.sha256 or "") for f in found if not f.is_dir}
        whole = json.dumps([(name, file.size, file.digest) for name, file in sorted(files.items())])
        now = "list-" + hashlib.sha256(whole.encode()).hexdigest()[:16]
        if commit and commit != now:
            raise SuiteError(f"{self.repository} has changed meanwhile", hint="run the same command again")
        return Listing(now, files)

    def fetch(self, folder: Path, commit: str, files: Mapping[str, Listed]) -> None:  # noqa: ARG002
        """One by one; what lies there whole is not fetched again."""
        with explained(self.repository):
            for name, file in files.items():
                self.api.download_file(
                    self.repository, self.holding, name, revision=self.branch, local_dir=folder,
                    expected_sha256=file.digest or None, file_size=file.size,
                )  # fmt: skip

    def create(self, *, public: bool) -> None:
        """The library's own default would be public, and Apache-2.0."""
        visibility = Visibility.PUBLIC if public else Visibility.PRIVATE
        with explained(self.repository), suppress(AlreadyExistsError):  # it may be there without the branch
            self.api.create_repo(self.repository, MODEL, visibility=visibility, license="other")
            self._note_what_the_hub_made()

    def _note_what_the_hub_made(self) -> None:
        """List a new repository's own README as ours: a push that is killed would else find it foreign."""
        with tempfile.TemporaryDirectory() as folder, suppress(NotExistError):  # it may not be to be seen yet
            for file in self.api.list_repo_files(self.repository, MODEL, revision=self.branch):
                self._download(file.path, folder)
            write_checksums(Path(folder))
            self._upload(Path(folder), [CHECKSUMS], "what the hub made")

    def _upload(self, folder: Path, names: Iterable[str], title: str) -> None:
        self.api.upload_folder(
            self.repository,
            MODEL,
            folder,
            commit_message=TITLE + title,
            revision=self.branch,
            allow_patterns=[glob.escape(name) for name in names],
            use_cache=False,  # it would lie in the folder; what is there is seen by looking
            disable_tqdm=True,
        )

    def send(self, folder: Path, changes: Changes, there: Remote, title: str) -> None:  # noqa: ARG002
        """Send, then remove."""
        with explained(self.repository):
            self._upload(folder, changes.send, title)
            if changes.remove:
                self.api.delete_files(
                    self.repository, MODEL, changes.remove, commit_message=TITLE + title, revision=self.branch
                )

    def publish(self) -> None:
        """Not to be had from here."""
        raise SuiteError(
            f"ms:{self.repository} is private, and ModelScope's library cannot open it",
            hint="make it public on its page, or push to another name",
        )


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """Turns the library's errors into a `Temporary` or a SuiteError; none of them holds the token."""
    try:
        yield
    except AuthenticationError:
        raise SuiteError("ModelScope does not accept the token", hint=LOG_IN) from None
    except PermissionDeniedError as error:
        raise SuiteError(f"no permission for {repository}: {error.message}", hint=error.suggestion) from None
    except (StorageError, OSError) as error:  # requests' own errors are OSErrors
        raise Temporary(str(error).splitlines()[0]) from None
    except HubError as error:
        if error.retryable:
            raise Temporary(error.message) from None
        raise SuiteError(f"ModelScope refuses: {error.message}", where=repository, hint=error.suggestion) from None
