"""What a card says of a checkpoint that was pushed unverified: one paragraph between markers, put in and taken out."""

import re
from collections.abc import Sequence

BEGIN, END = "<!-- fourge:notice:begin -->", "<!-- fourge:notice:end -->"

_NOTICE = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n*", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---\n.*?^---\n+", re.DOTALL | re.MULTILINE)


def with_notice(card: str, failed_checks: Sequence[str]) -> str:
    """The card saying, under its metadata, which checks failed; without the paragraph where none did."""
    bare = _NOTICE.sub("", card)
    if not failed_checks:
        return bare
    notice = (
        f"{BEGIN}\n> **Not verified.** `fourge verify` failed when this was pushed, and it was pushed with `--force`. "
        f"Failed: {', '.join(failed_checks)}.\n{END}\n\n"
    )
    front = _FRONT_MATTER.match(bare)
    place = front.end() if front else 0
    return bare[:place] + notice + bare[place:]
