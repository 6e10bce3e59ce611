"""What `fourge page` says when the page is written."""

from typing import TYPE_CHECKING

from fourge.progress import format_bytes

if TYPE_CHECKING:
    from fourge.page import PageResult


def page_summary(result: "PageResult") -> str:
    """The file, then the findings of the page's sections."""
    width = max(map(len, result.findings), default=0)
    lines = [f"{result.path}  {format_bytes(result.nbytes)}"]
    return "\n".join([*lines, *(f"  {topic:<{width}}  {finding}" for topic, finding in result.findings.items())])
