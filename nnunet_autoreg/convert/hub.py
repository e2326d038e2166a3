"""Find weights that are named by a path, or by the address of a repository on Hugging Face.

A repository is downloaded once, by huggingface_hub and into its cache. Without a network, or with
``HF_HUB_OFFLINE=1``, what is in the cache is used.
"""

import logging
import os
import re
from pathlib import Path

from nnunet_autoreg.convert.source import SUFFIXES
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.io.addresses import HUB, advice_for, is_address

log = logging.getLogger(__name__)

EXTRA = 'pip install "nnunet-autoreg[hf]"'
NEEDED_FILES = (*(f"*{suffix}" for suffix in SUFFIXES), "*.json", "README.md")
"""What is downloaded of a repository."""

_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


def local_weights(given: str) -> Path:
    """Return the path of weights: the given one, or that of a repository's local copy.

    Args:
        given: a path, ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``.

    Raises:
        WeightsError: it is another address (code "weights-address"), or the repository is neither
            in the cache nor can it be downloaded (code "weights-download"), or huggingface_hub is
            not installed (code "weights-no-hub").
    """
    if not is_address(given):
        return Path(given)
    if not given.startswith(HUB):
        raise WeightsError(advice_for(given), code="weights-address")

    named = _REPOSITORY.fullmatch(given.removeprefix(HUB))
    if named is None:
        raise WeightsError(
            f"{given} is not the address of a repository; write {HUB}OWNER/NAME, or "
            f"{HUB}OWNER/NAME@REVISION",
            code="weights-address",
        )

    repository, revision = named[1], named[2]

    # Who downloads what is nobody's business. The variable is read when the package is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise WeightsError(
            f"{given} needs the package huggingface_hub; type {EXTRA}, or download the repository "
            "yourself and give its folder",
            code="weights-no-hub",
        ) from error

    log.info("%s: checking the cache, and Hugging Face for updates", given)
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=list(NEEDED_FILES))
    except Exception as error:  # its errors have no common class, and differ between versions
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{given} is not in the cache of Hugging Face and cannot be downloaded "
            f"({type(error).__name__}: {reason}); check the name, the network and HF_HUB_OFFLINE, "
            "or give the folder of a repository that you have downloaded",
            code="weights-download",
        ) from error
    return Path(folder)
