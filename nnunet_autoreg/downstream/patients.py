"""Find the patients of cases by the cases' names."""

import re
from collections.abc import Sequence

MOST_SCANS_OF_A_PATIENT = 4
PATIENT_COLUMNS = ("patient", "subject", "participant_id")
"""Names that the column of patients may have in a table of cases."""


def subjects_by_name(cases: Sequence[str]) -> dict[str, str]:
    """Return case -> patient: the name up to the first number that distinguishes patients.

    ``patient001_ED`` and ``patient001_ES`` are of one patient, ``hippocampus_001`` and
    ``hippocampus_003`` of two. A number is skipped if patients would have more than four scans each
    on average. This is so for the 22 of ``FLARE22_Tr_0001`` and for the site of ``site1_0001``.
    """
    # Where the numbers in each name end.
    ends_of: dict[str, list[int]] = {}
    for case in cases:
        ends_of[case] = [match.end() for match in re.finditer(r"\d+", case)]

    most_numbers = max(map(len, ends_of.values()), default=0)
    for index in range(most_numbers):
        found = {}
        for case, ends in ends_of.items():
            # A name with fewer numbers is used whole.
            found[case] = case[: ends[index]] if index < len(ends) else case
        if len(cases) <= MOST_SCANS_OF_A_PATIENT * len(set(found.values())):
            return found
    return {case: case for case in cases}
