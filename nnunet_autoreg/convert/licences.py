"""Find out whose weights these are, and under what licence. Torch-free."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_autoreg.io.addresses import repository_of

NONE_STATED = "none stated"
SHARE_ALIKE = "share-alike: weights that you derive from these inherit the licence"

KNOWN = (
    # Pattern in the file's own texts, name, licence, modalities. Source: the model cards of the
    # two projects.
    (
        re.compile("nnfoundation", re.IGNORECASE),
        "nnFoundation",
        f"CC-BY-SA-4.0 ({SHARE_ALIKE})",
        ("CT", "MR", "PET"),
    ),
    (re.compile("openmind", re.IGNORECASE), "OpenMind", "CC-BY-4.0", ("MR",)),
)
AR_SSL4M_LICENCE = {"AR-SSL4M": NONE_STATED}

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)
_LICENCE_LINE = re.compile(r"^license:\s*[\"']?([^\"'\n]+)", re.MULTILINE)


def licences_of(
    plan: Mapping[str, Any],
    citations: Any,
    file: Path,
    stated: str | None = None,
) -> dict[str, str]:
    """Return the licence of the weights, by what they were made from.

    The user's statement comes first, then a model card beside the file, then what is known of the
    two projects.

    Args:
        plan: nnssl's adaptation plan.
        citations: what has to be cited according to the file.
        stated: licence that the user has stated.
    """
    known = _known(plan, citations, file)
    name = known[1] if known else _dataset_of(plan) or file.name

    if stated:
        return {name: stated_by_user(stated)}
    card = licence_beside(file.parent)
    if card:
        return {name: f"{card} (README.md beside the file)"}
    return {name: known[2] if known else NONE_STATED}


def stated_by_user(licence: str) -> str:
    """Return the entry for a licence that the user has typed."""
    return f"{licence} (stated by the user)"


def modalities_of(plan: Mapping[str, Any], citations: Any, file: Path) -> tuple[str, ...]:
    """Return the modalities of the two known projects; empty for other weights."""
    known = _known(plan, citations, file)
    return known[3] if known else ()


def _known(
    plan: Mapping[str, Any],
    citations: Any,
    file: Path,
) -> tuple[re.Pattern[str], str, str, tuple[str, ...]] | None:
    names = (file.resolve().parent.name, repository_of(file)[0])
    texts = " ".join((_dataset_of(plan), str(citations or ""), *names))
    for row in KNOWN:
        if row[0].search(texts):
            return row
    return None


def _dataset_of(plan: Mapping[str, Any]) -> str:
    pretraining = plan.get("pretrain_plan")
    if not isinstance(pretraining, Mapping):
        return ""
    return str(pretraining.get("dataset_name") or "")


def licence_beside(folder: Path) -> str:
    """Return the licence that a model card in a folder names, or "" if there is none.

    A model card is a ``README.md`` with front matter, as on Hugging Face.
    """
    readme = folder / "README.md"
    if not readme.is_file():
        return ""

    beginning = readme.read_text(encoding="utf-8", errors="replace")[:20_000]
    front_matter = _FRONT_MATTER.search(beginning)
    found = _LICENCE_LINE.search(front_matter[1]) if front_matter else None
    return found[1].strip() if found else ""
