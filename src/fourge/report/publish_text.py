"""What `fourge push`, `fourge sign` and `fourge sbom` report, as text for people."""

from typing import TYPE_CHECKING

from fourge.progress import format_bytes

if TYPE_CHECKING:
    from fourge.push import PushResult
    from fourge.sbom import SbomResult
    from fourge.sign import SignResult


def push_summary(result: "PushResult") -> str:
    """Where it went, and with `--dry-run` every file with its size."""
    total = f"{len(result.files)} files, {format_bytes(result.total_bytes)}"
    lines = []
    if result.dry_run:
        lines += [f"  {size:>16,}  {name}" for name, size in result.files.items()]
        where = result.repository if result.revision is None else f"{result.repository} at {result.revision}"
        lines.append(f"{total} would go to {where}; nothing was sent")
    else:
        lines.append(f"{result.url}: {total}")
    if result.failed_checks:
        card = "would say so" if result.dry_run else "says so"
        lines.append(f"  NOT VERIFIED ({', '.join(result.failed_checks)}); the card {card}")
    return "\n".join(lines)


def sign_summary(result: "SignResult") -> str:
    """What was signed, and the command that checks it."""
    return (
        f"{result.signature}\n"
        f"  signs        {result.files} files, {format_bytes(result.total_bytes)}\n"
        f"  check with   fourge verify {result.output} --signature --public-key PUBLIC.pem"
    )


def sbom_summary(result: "SbomResult") -> str:
    """What was written, and what it cannot say."""
    licence = result.licence or "not stated in the card's metadata"
    return (
        f"{result.sbom}\n  lists        {result.files} files of the model, and the source's\n  licence      {licence}"
    )
