"""Which model a card is about, as its readers load it: a comment in the card, so that every later command knows."""

import re

_COMMENT = re.compile(r"<!-- fourge:model (\S+) -->")


def model_comment(model_id: str) -> str:
    """The comment that says what the card's commands load: `ORG/NAME`, or a folder's name before that is known."""
    return f"<!-- fourge:model {model_id} -->"


def model_of(card: str) -> str | None:
    """What the comment of a card says; None for a card without one."""
    found = _COMMENT.search(card)
    return None if found is None else found[1]


def repository_of(card: str) -> str | None:
    """The repository that a card was written for; None where it names a folder alone, or nothing."""
    model = model_of(card)
    return model if model is not None and "/" in model else None
