"""What `fourge serve` and `fourge chat` did, as texts for people."""

from typing import TYPE_CHECKING

from fourge.progress import format_seconds

if TYPE_CHECKING:
    from fourge.chat import ChatResult
    from fourge.serve import ServeResult
    from fourge.serving.smoke import Comparison


def serve_summary(result: "ServeResult") -> str:
    """The command alone where it was only to be printed, so that a shell can take it; else what happened."""
    if result.printed_only:
        return result.command
    lines = [f"{result.output}", f"  served on    {result.hardware}, by {result.kernel}: {result.numerics}"]
    if result.start_seconds is None:
        lines.append("  stopped      before it was ready")
    else:
        lines.append(f"  ready after  {format_seconds(result.start_seconds)}, generated {result.generated!r}")
    if result.comparison is not None:
        lines += _comparison_lines(result.comparison)
    else:
        lines.append(f"  ended        exit code {result.exit_code}")
    return "\n".join(lines)


def _comparison_lines(found: "Comparison") -> list[str]:
    verdict = "agree" if found.agrees else "DO NOT AGREE"
    return [
        f"  smoke        log-probabilities of {found.tokens} probe tokens {verdict}; both sides {found.numerics}",
        f"    mean         served {found.served:.4f}, ours {found.ours:.4f}, difference {found.mean_difference:+.4f} "
        f"(limit {found.mean_limit:.2f} nats)",
        f"    by token     {found.token_difference:.4f} apart on average (limit {found.token_limit:g})",
    ]


def chat_summary(result: "ChatResult") -> str:
    """Nothing: standard output has the answers, and whoever pipes them wants no more."""
    return ""
