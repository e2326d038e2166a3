"""The page of measurements shows what the files of results say."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import measured


def test_the_tables_of_the_page_equal_the_results() -> None:
    page = measured.PAGE.read_text(encoding="utf-8")

    assert measured.filled(page) == page


def test_a_changed_figure_is_noticed() -> None:
    page = measured.PAGE.read_text(encoding="utf-8")
    changed = page.replace("<!-- end -->", "| an invented row |\n<!-- end -->", 1)

    assert changed != page
    assert measured.filled(changed) == page
