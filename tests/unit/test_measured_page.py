"""The page of measurements shows what the files of results say."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import evidence_picture
import measured
import pytest
from matplotlib.figure import Figure


@pytest.mark.parametrize("file", measured.PAGES, ids=lambda file: file.stem)
def test_the_tables_of_a_page_equal_the_results(file: Path) -> None:
    page = file.read_text(encoding="utf-8")

    assert measured.filled(page) == page


def test_a_changed_figure_is_noticed() -> None:
    page = measured.PAGES[0].read_text(encoding="utf-8")
    # A row that no result gives, as after a change by hand.
    changed = page.replace("<!-- end -->", "| an invented row |\n<!-- end -->", 1)

    assert changed != page
    assert measured.filled(changed) == page


def test_the_picture_of_the_evidence_shows_one_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: figures.append(self))

    evidence_picture.main()

    finetuned, probed = figures[0].axes
    lines = [line for line in measured.lines_of("evidence.jsonl") if line["set"] == "ixi"]
    column = evidence_picture.COLUMNS[-1]
    scores = evidence_picture.finetunings(lines, column)
    draws_of = []
    for other in evidence_picture.COLUMNS:
        draws_of.append({draw for draw, _ in evidence_picture.finetunings(lines, other)})
    draws = set.intersection(*draws_of)
    expected = [dice for (draw, _), dice in scores.items() if draw in draws]
    points = [found for found in finetuned.collections if len(found.get_offsets()) == len(expected)]
    assert sorted(points[-1].get_offsets()[:, 1]) == pytest.approx(sorted(expected))
    for axes in (finetuned, probed):
        low, high = axes.get_ylim()
        assert high - low >= 0.1
        assert "n = 20" in axes.get_title()
