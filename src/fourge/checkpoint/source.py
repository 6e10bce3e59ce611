"""From what the user names a model by to a directory on this machine."""

from pathlib import Path

from fourge.errors import InputError

# What a checkpoint is made of; never pickles.
_WANTED = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "*.model", "*.tiktoken"),
    *("tokenizer*", "LICENSE*", "LICENCE*", "NOTICE*"),
)
# Subfolders hold the same weights in other layouts, and so does Mistral's consolidated file.
_UNWANTED = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth")


def locate(model: str, revision: str | None = None) -> Path:
    """The directory of `model`: a local directory as it is, or a hub id's snapshot in the hub cache.

    A hub id is downloaded as far as the cache lacks it, at `revision` (branch, tag or commit; the default
    branch without). With `HF_HUB_OFFLINE` the cache alone is asked. Raises InputError where neither has it.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision}: {model} is a local directory, which has none; leave it out")
        return local
    if local.exists():
        raise InputError(f"{model}: a file, not a checkpoint; give the directory that it lies in")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = model if revision is None else f"{model} at revision {revision}"
    try:
        snapshot = snapshot_download(
            model, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
        )
    except HFValidationError as error:
        raise InputError(f"{model}: no such directory, and not a hub id (ORG/NAME); check the spelling") from error
    except GatedRepoError as error:
        raise InputError(
            f"{model}: gated; ask for access at {constants.ENDPOINT}/{model}, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"--revision {revision}: {model} has no such branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{model}: neither a local directory nor a model on the hub; check the spelling, and set "
            "HF_TOKEN if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise InputError(
            f"{named}: not a local directory, not complete in the hub cache {constants.HF_HUB_CACHE}, "
            f"and {why}; run `hf download {model}` on a connected machine, or give a local directory"
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{named}: the hub refused the download ({reason}); try again later") from error
    return Path(snapshot)
