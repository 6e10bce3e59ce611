"""The upload to a model hub by huggingface_hub, whose errors become one line in which no token is to be seen.

`upload_folder` is its resumable upload of large folders since 1.20: many commits, what arrived is not sent again. The
older `upload_large_folder`, gone in 2.0, will not do: it tries for ever what the hub refuses, does not end on Ctrl-C,
and remembers which files were sent but not where to, so that a second repository gets none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fourge.errors import InputError
from fourge.publishing.published_files import HIDDEN

Result = TypeVar("Result")

_LONGEST_REASON = 400


def require_repository_name(repository: str) -> None:
    """Raises InputError unless it is ORG/NAME as the hub spells names."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{repository}: not a name on the hub ({_one_line(str(error))}); give ORG/NAME") from None
    if "/" not in repository:
        raise InputError(f"{repository}: whose? Give ORG/NAME")


def require_token() -> None:
    """Raises InputError where huggingface_hub knows no token; asks it alone, so that none passes through us."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError("no token for the hub: run `hf auth login`, or set HF_TOKEN")


def upload(output: Path, repository: str, *, private: bool, revision: str | None, message: str) -> str:
    """Uploads `published_files(output)` and returns the URL; what an earlier, stopped call sent is not sent again.

    Makes the repository and the branch `revision` where they are missing. Raises InputError where the hub refuses, and,
    before anything is sent, where `private` is asked of a repository that everyone can see.
    """
    from huggingface_hub import HfApi

    api = HfApi()

    def prepare() -> tuple[str, bool]:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        return str(url), private and not api.repo_info(repository).private

    def send() -> None:
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=output,
            revision=revision,
            ignore_patterns=list(HIDDEN),
            commit_message=message,
        )

    url, visible = _with_refusals_named(repository, prepare)
    if visible:
        raise InputError(
            f"{repository} is there already and public: make it private on the hub, or leave --private out"
        )
    _with_refusals_named(repository, send)
    return url


def _with_refusals_named(repository: str, call: Callable[[], Result]) -> Result:
    """What `call` returns; what goes wrong on the way to the hub is the user's to mend, and said in one line.

    That line is raised with nothing chained to it: a server may repeat the request's headers in its answer, and the
    library's own error would show them.
    """
    # huggingface_hub 1 speaks through httpx, 2 through httpx2: what it names HTTPError is the base of either's errors.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        return call()
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        refusal = _without_token(_one_line(str(error) or repr(error)))
    raise InputError(
        f"{repository}: the hub did not take it ({refusal}); what was sent is kept, the same command continues"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST_REASON]


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text if token is None else text.replace(token, "…")
