"""Counts, amounts and durations as people write them."""

import pytest

from nnunet_autoreg.wording import amount, counted, duration, storage


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "scan", "1 scan"),
        (0, "scan", "0 scans"),
        (1234, "scan", "1,234 scans"),
        # A consonant before "y", a hissing sound, and a vowel before "y".
        (2, "patch", "2 patches"),
        (2, "copy", "2 copies"),
        (2, "day", "2 days"),
    ],
)
def test_one_thing_is_singular(number, noun, text):
    assert counted(number, noun) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (7, "7"),
        (950, "950"),
        (12_345, "12,000"),
        # Rounded to two digits it is a million.
        (999_999, "1 million"),
        (1_297_000, "1.3 million"),
        (10_000_000, "10 million"),
        (2.04e9, "2 billion"),
    ],
)
def test_a_large_number_has_two_digits_and_a_word(number, text):
    assert amount(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.412, "0.41 s"),
        (9.97, "10 s"),
        (25.4, "25 s"),
        (170, "3 min"),
        (5399, "90 min"),
        (9000, "2.5 h"),
        (345_600, "4 days"),
    ],
)
def test_a_duration_has_its_natural_unit(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (1, "1 MiB"),
        (850 * 2**20, "850 MiB"),
        # 1000 MiB are written with four digits, 0.98 GiB with two.
        (1000 * 2**20, "0.98 GiB"),
        (2.54 * 2**30, "2.5 GiB"),
        (1500 * 2**30, "1,500 GiB"),
    ],
)
def test_a_size_is_never_zero(num_bytes, text):
    assert storage(num_bytes) == text
