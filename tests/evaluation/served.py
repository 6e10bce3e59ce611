"""What a server of the tests answers with: a function of the path and of the request's JSON."""

from collections.abc import Callable
from typing import Any

Handler = Callable[[str, dict[str, Any] | None], dict[str, Any]]
