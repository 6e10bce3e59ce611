"""The page as one file: template, style and script of the package around the sections, with nothing to load."""

import base64
import hashlib
from importlib.resources import files

from fourge.publishing.page_markup import Markup, join, tag, trusted
from fourge.publishing.page_section import Section

_PARTS = "page"


def document(title: str, header: Markup, sections: list[Section], refresh_seconds: int | None = None) -> str:
    """The whole HTML text; with `refresh_seconds`, a page that the browser reads again after that time.

    The content security policy allows this page's own script, by its digest, and no connection whatsoever.
    """
    style, script = _part("page.css"), _part("page.js")
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    )
    refresh = None if refresh_seconds is None else tag("meta", http_equiv="refresh", content=refresh_seconds)
    links = [tag("a", section.topic, href=f"#{section.identifier}") for section in sections]
    filled = {
        "policy": tag("meta", http_equiv="Content-Security-Policy", content=policy),
        "refresh": refresh,
        "title": tag("title", title),
        "style": tag("style", trusted(style)),
        "header": header,
        "links": tag("nav", links, aria_label="Sections"),
        "sections": join(section.render() for section in sections),
        "script": tag("script", trusted(script)),
    }
    # One pass from left to right: what a file says is never looked at for places to fill.
    page = _part("page.html").split("@@")
    return "".join(piece if number % 2 == 0 else join([filled[piece]]) for number, piece in enumerate(page))


def _part(name: str) -> str:
    return files("fourge.publishing").joinpath(_PARTS, name).read_text(encoding="utf-8")
