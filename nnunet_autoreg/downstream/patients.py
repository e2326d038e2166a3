"""The patients of cases: named in a table, or taken from the cases' names."""

import re
from collections.abc import Sequence

MOST_SCANS_OF_A_PATIENT = 4
PATIENT_COLUMNS = ("patient", "subject", "participant_id")
"""Names that the column of patients may have in a table of cases."""


def subjects_by_name(cases: Sequence[str]) -> dict[str, str]:
    """Return case -> patient: the name up to the first number that distinguishes patients.

    ``patient001_ED`` and ``patient001_ES`` are one patient, ``hippocampus_001`` and
    ``hippocampus_003`` two. A number that would give patients more than four scans each on average
    is skipped, as the 22 of ``FLARE22_Tr_0001`` and the site of ``site1_0001``.
    """
    most_numbers = max((len(re.findall(r"\d+", case)) for case in cases), default=0)
    for count in range(1, most_numbers + 1):
        found = {case: _up_to_number(case, count) for case in cases}
        if len(cases) <= MOST_SCANS_OF_A_PATIENT * len(set(found.values())):
            return found
    return {case: case for case in cases}


def _up_to_number(case: str, count: int) -> str:
    ends = [match.end() for match in re.finditer(r"\d+", case)]
    return case[: ends[count - 1]] if len(ends) >= count else case
