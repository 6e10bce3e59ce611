"""What the demo publishes: where its source is from, and enough questions and tokens for its figures to mean it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fourge.evaluation.suites import part_of_suite
from fourge.publishing.source_card import read_source_card

DEMO = Path(__file__).parents[1] / "demo"
HIDDEN_SIZE = 576
"""SmolLM2-135M's: q, k, v, o, gate and up have as many columns, and `replay` wants more tokens than that."""


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(DEMO))
    import demo

    yield demo
    for name in ("demo", "questions", "smollm2"):
        sys.modules.pop(name)


def test_its_source_says_licence_and_origin(demo: ModuleType, tmp_path: Path) -> None:
    from smollm2 import SOURCE_CARD  # type: ignore[import-not-found]

    (tmp_path / "README.md").write_text(SOURCE_CARD)
    assert read_source_card(tmp_path).inherited("license") == "apache-2.0"
    assert demo.BASE_MODEL in SOURCE_CARD and "GGUF" in demo.ORIGIN and "Q4_1" in demo.ORIGIN


def test_the_quick_form_is_enough_for_its_figures(demo: ModuleType) -> None:
    quick = demo.QUICK
    assert quick.limit >= 24 and part_of_suite("smoke", quick.tasks).tasks
    assert quick.samples * quick.length > HIDDEN_SIZE
