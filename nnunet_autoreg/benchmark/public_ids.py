"""Numbers that replace the names of cases and patients in results, since people may have them.

Only ``paths_do_not_share.csv`` beside the results says which name belongs to which number.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunet_autoreg.benchmark.split import ordered
from nnunet_autoreg.corpus.private import PRIVATE_NAME, read_private, write_private

CASE, PATIENT = "case-", "patient-"
EXCLUDE_HEADER = "# Names of cases, for autoreg_pretrain --exclude. Do not share this file.\n"


@dataclass(frozen=True)
class PublicIds:
    """The ids of cases and patients in results.

    Attributes:
        cases, patients: name -> id. A name without an id is kept, as in the folders of earlier
            versions.
    """

    cases: Mapping[str, str]
    patients: Mapping[str, str]

    def of_case(self, name: str) -> str:
        """Return the name of a case in results."""
        return self.cases.get(name, name)

    def of_patient(self, name: str) -> str:
        """Return the name of a patient in results."""
        return self.patients.get(name, name)


NO_IDS = PublicIds({}, {})


def read_ids(folder: Path) -> PublicIds:
    """Return the ids that a folder's private file knows.

    Raises:
        UsageError: the file is missing or damaged.
    """
    cases: dict[str, str] = {}
    patients: dict[str, str] = {}
    for cells in read_private(folder):
        if cells["id"].startswith(CASE):
            cases[cells["case"]] = cells["id"]
        elif cells["id"].startswith(PATIENT):
            patients[cells["name"]] = cells["id"]
    return PublicIds(cases, patients)


def assign_ids(folder: Path, patient_of: Mapping[str, str]) -> PublicIds:
    """Return ids of all cases and patients; new ones are added to the folder's private file.

    Args:
        patient_of: case -> patient.
    """
    known = read_ids(folder) if (folder / PRIVATE_NAME).is_file() else NO_IDS
    cases = _with_new(known.cases, patient_of, CASE)
    patients = _with_new(known.patients, patient_of.values(), PATIENT)

    has_new = len(cases) > len(known.cases) or len(patients) > len(known.patients)
    if has_new:
        lines = [{"id": public, "case": name} for name, public in cases.items()]
        lines += [{"id": public, "name": name} for name, public in patients.items()]
        write_private(folder, lines)
    return PublicIds(cases, patients)


def _with_new(known: Mapping[str, str], names: Iterable[str], prefix: str) -> dict[str, str]:
    """Return the known ids and those of new names.

    New names are numbered by their hashes: in alphabetical order a number would reveal something of
    the name.
    """
    ids = dict(known)
    for name in ordered(set(names) - set(known)):
        ids[name] = f"{prefix}{len(ids) + 1:04d}"
    return ids
