"""vLLM's processes inherit the environment: Triton's interpreter is for our own tests, not for its kernels."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_interpreter() -> Iterator[None]:
    """Takes TRITON_INTERPRET out for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield
