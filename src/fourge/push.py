"""`fourge push`: a verified checkpoint to a model hub, resumable; what was not verified says so in its card."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fourge.errors import InputError
from fourge.verify import verify


@dataclass(frozen=True)
class PushResult:
    """What was sent, or with `dry_run` would be: `files` are bytes by name.

    `failed_checks` are those of `fourge verify` that failed and were overruled with `--force`; the card names them.
    """

    output: Path
    repository: str
    revision: str | None
    url: str | None
    files: Mapping[str, int]
    total_bytes: int
    failed_checks: tuple[str, ...]
    dry_run: bool


def push(
    output: Annotated[Path, typer.Argument(help="The quantized checkpoint's directory.")],
    repository: Annotated[str, typer.Argument(help="Where to: ORG/NAME on the hub.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Make the repository one that only you see.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, made if missing [default: main].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify, list files and bytes; send nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Push what fails verification as well; the card then says so.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads for the verification; 0 leaves it to torch.")] = 0,
) -> PushResult:
    """Verify a checkpoint, then upload it to the hub. The same command continues an upload that was stopped.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN) and is never shown. `.fourge` stays here. Raises
    InputError where there is no card, verification fails without `--force`, or the hub refuses.
    """
    from fourge.publishing.hub_upload import require_repository_name, require_token, upload
    from fourge.publishing.published_files import published_files

    output = Path(output)  # a script may well give a string
    require_repository_name(repository)
    if not dry_run:
        require_token()
    _require_card(output, repository)
    published_files(output)  # what must not be published is refused before the long verification
    report = verify(output, threads=threads)
    failed = tuple(check.name for check in report.checks if check.status == "failed")
    if failed and not force:
        raise InputError(
            f"{output} fails verification ({', '.join(failed)}), nothing was sent; `fourge verify {output}` says why, "
            "--force pushes it with a line in the card"
        )
    if not dry_run:
        _say_in_card(output, failed)
    files = published_files(output)
    url = None
    if not dry_run:
        message = "Upload NVFP4 checkpoint" + (" (not verified)" if failed else "")
        url = upload(output, repository, private=private, revision=revision, message=message)
    return PushResult(output, repository, revision, url, files, sum(files.values()), failed, dry_run)


def _require_card(output: Path, repository: str) -> None:
    """A card of ours, whose commands load what is pushed."""
    from fourge.checkpoint.folder import CARD, has_own_card
    from fourge.publishing.card_model import model_of

    if not output.is_dir():
        raise InputError(f"{output}: no such directory; give the one that `fourge quantize` wrote")
    mend = f"`fourge card {output} --repository {repository}`"
    if not has_own_card(output):
        state = "is the source's" if (output / CARD).is_file() else "is missing"
        raise InputError(f"{output / CARD} {state}: write the model card first, with {mend}")
    model = model_of((output / CARD).read_text(encoding="utf-8"))
    if model not in (None, repository):
        raise InputError(
            f"{output / CARD} tells its readers to load {model}: write it anew for what is pushed, with {mend}"
        )


def _say_in_card(output: Path, failed: tuple[str, ...]) -> None:
    """Puts the notice of failed checks in the card, or takes an old one out; a signature over the card forbids it."""
    from fourge.checkpoint.durable import replaced
    from fourge.checkpoint.folder import CARD
    from fourge.publishing.notice import with_notice
    from fourge.publishing.signed import require_unsigned

    card = output / CARD
    before = card.read_text(encoding="utf-8")
    after = with_notice(before, failed)
    if after == before:
        return
    require_unsigned(output, card, after.encode())
    with replaced(card) as temporary:
        temporary.write_text(after, encoding="utf-8")
