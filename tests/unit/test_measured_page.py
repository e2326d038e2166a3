"""The page of measurements shows what the files of results say."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import measured
import pytest


@pytest.mark.parametrize("file", measured.PAGES, ids=lambda file: file.stem)
def test_the_tables_of_a_page_equal_the_results(file: Path) -> None:
    page = file.read_text(encoding="utf-8")

    assert measured.filled(page) == page


def test_a_changed_figure_is_noticed() -> None:
    page = measured.PAGES[0].read_text(encoding="utf-8")
    changed = page.replace("<!-- end -->", "| an invented row |\n<!-- end -->", 1)

    assert changed != page
    assert measured.filled(changed) == page
