"""Addresses on the web that were typed instead of a file or folder.

``Path`` would turn ``https://host/file`` into the relative path ``https:/host/file``, so addresses
are recognised before paths are made.
"""

import re
from pathlib import Path

HUB = "hf://"
"""Begins the address of a repository on Hugging Face: ``hf://OWNER/NAME``."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?huggingface\.co/(?!datasets/|spaces/)([\w.-]+/[\w.-]+)",
    re.ASCII,
)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)


def is_address(text: str) -> bool:
    """Return whether a text is an address such as ``https://host/file``, and no path."""
    return _ADDRESS.match(text) is not None


def advice_for(address: str) -> str:
    """Return in one line why an address cannot be used as a path, and what to do instead."""
    if address.startswith(HUB):
        return (
            f"{address} is a repository on Hugging Face, and a file or folder is expected here; "
            f"import weights first: autoreg_weights import {address} --name NAME"
        )

    page = _HUB_PAGE.match(address)
    if page:
        return (
            f"{address} is a web address, and nothing is downloaded from there; "
            f"for weights type autoreg_weights import {HUB}{page[1]} --name NAME"
        )
    return (
        f"{address} is a web address, and nothing is downloaded from there; download the file "
        "yourself, then give its path"
    )


def repository_of(file: Path) -> tuple[str, str]:
    """Return repository and commit of a file in Hugging Face's cache; empty for other files.

    The cache holds ``models--OWNER--NAME/snapshots/COMMIT/FILE``. Names of other folders are
    private, so nothing is returned for them.
    """
    # Links are not followed: they lead to files that are named after their hashes.
    parts = file.absolute().parts[-4:-1]
    if len(parts) < 3 or parts[1] != "snapshots":
        return "", ""
    cached = _CACHED.fullmatch(parts[0])
    if cached is None:
        return "", ""
    return f"{cached[1]}/{cached[2]}", parts[2]
