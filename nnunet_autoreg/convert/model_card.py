"""Write the model card of an encoder: the ``README.md`` of a repository on Hugging Face.

It describes the encoder, its sources, whether it has learnt anything, and how to use it. All of it
comes from ``encoder.json``, which holds no path and no name of a patient.
"""

import json
import re
from collections.abc import Mapping

from nnunet_autoreg import __version__
from nnunet_autoreg.convert.licences import NONE_STATED
from nnunet_autoreg.errors import printable
from nnunet_autoreg.geometry import size_text
from nnunet_autoreg.model.card import IMPORTED, EncoderCard
from nnunet_autoreg.model.verdict import NO_VERDICT
from nnunet_autoreg.wording import counted

OTHER_IDS = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "gpl-3.0", "lgpl-3.0")
UNKNOWN_LICENCE, OTHER_LICENCE = "unknown", "other"
"""What Hugging Face calls a licence that is not stated, and one that has no identifier there."""

_CREATIVE_COMMONS = re.compile(r"(cc-by(?:-nc)?(?:-sa|-nd)?)-(2\.0|2\.5|3\.0|4\.0)\b")


def model_card(card: EncoderCard) -> str:
    """Return the text of ``README.md``, with the front matter that Hugging Face reads."""
    sections = [
        _front_matter(card),
        _introduction(card),
        _verdict(card),
        _data(card),
        _network(card),
        _use(card),
    ]
    return "\n\n".join(sections) + "\n"


def licence_id(licences: Mapping[str, str]) -> str:
    """Return Hugging Face's identifier of the licence of weights.

    Args:
        licences: licences of everything that the weights were made from. If they differ, none of
            them is that of the weights.
    """
    identifiers = {_id_of(text) for text in licences.values()}
    if not identifiers:
        return UNKNOWN_LICENCE
    return identifiers.pop() if len(identifiers) == 1 else OTHER_LICENCE


def _id_of(text: str) -> str:
    words = "-".join(text.lower().split())
    if not words or words == "-".join(NONE_STATED.split()):
        return UNKNOWN_LICENCE
    if words.startswith("cc0"):
        return "cc0-1.0"

    creative_commons = _CREATIVE_COMMONS.match(words)
    if creative_commons:
        return "-".join(creative_commons.groups())
    for known in OTHER_IDS:
        if words.startswith(known):
            return known
    return OTHER_LICENCE


def _front_matter(card: EncoderCard) -> str:
    """Return the block of YAML. All strings and lists of JSON are valid there."""
    tags = ["medical-imaging", "nnunet", "self-supervised-learning", "3d"]
    tags += [modality.lower() for modality in card.modalities]
    lines = ["---", f"license: {licence_id(card.licences)}"]
    if licence_id(card.licences) == OTHER_LICENCE:
        lines.append("license_name: see-the-table-of-data")
    lines += [
        "library_name: nnunet-autoreg",
        "pipeline_tag: image-feature-extraction",
        f"tags: {json.dumps(tags)}",
        "---",
    ]
    return "\n".join(lines)


def _introduction(card: EncoderCard) -> str:
    return f"""\
# {card.name}

A 3D encoder (`{card.encoder}`) for nnU-Net v2, written by nnunet-autoreg {__version__}. It segments
nothing by itself: trainings on labelled {"/".join(card.modalities)} scans start from it.

Pretraining: {_plain(card.objective)}.

This is research software and no medical device. Do not base decisions about patients on its
output."""


def _verdict(card: EncoderCard) -> str:
    """Return the section about the results of validation."""
    verdict = card.verdict or NO_VERDICT
    lines = ["## Has it learnt anything?", "", f"**{verdict.outcome}**: {_plain(verdict.reason)}."]

    rows = [(f"validation error: {name}", value) for name, value in verdict.errors.items()]
    rows += [(f"balanced accuracy by {name}", value) for name, value in verdict.probe.items()]
    if rows:
        lines += ["", "| figure | value |", "| --- | --- |"]
        lines += [f"| {_plain(name)} | {value:.4g} |" for name, value in rows]

    if verdict.num_validation_scans:
        kept_out = counted(verdict.num_validation_scans, "scan")
        lines += ["", f"The figures are of {kept_out} that training has not seen."]
    return "\n".join(lines)


def _data(card: EncoderCard) -> str:
    """Return the section about the sources of the weights."""
    lines = ["## Data and licence", ""]
    if card.num_scans:
        steps = counted(card.num_steps, "step")
        lines += [f"{counted(card.num_scans, 'scan')} ({'/'.join(card.modalities)}), {steps}.", ""]

    lines += ["| made from | licence |", "| --- | --- |"]
    for name, text in card.licences.items():
        lines.append(f"| {_plain(name)} | {_plain(text or NONE_STATED)} |")
    if not card.licences:
        lines.append(f"| scans without a statement | {NONE_STATED} |")

    lines += [
        "",
        "What is derived from these weights is bound by the licences of what they were made from.",
    ]
    return "\n".join(lines)


def _network(card: EncoderCard) -> str:
    """Return the section about network and input."""
    normalization = card.normalization or "z-score"
    if card.normalization is None and card.ct_window is not None:
        low, high = card.ct_window.percentile_00_5, card.ct_window.percentile_99_5
        normalization = f"CT clipped to {low:g} to {high:g} HU and scaled; all else by z-score"

    facts = {
        "class": card.class_path,
        "channels": card.channels_text,
        "voxel size": f"{size_text(card.spacing_mm, 'g')} mm (z, y, x)",
        "crop": f"{size_text(card.crop_size_vox)} voxels (z, y, x)",
        "token or total stride": f"{size_text(card.token_size_vox)} voxels",
        "normalisation": normalization,
        "decoder": "pretrained too" if card.has_decoder else "none",
    }
    lines = ["## Network and input", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_plain(text)} |" for name, text in facts.items()]
    lines += [
        "",
        "`config.json` holds all arguments of the network, and the SHA-256 of `model.safetensors`.",
    ]
    return "\n".join(lines)


def _use(card: EncoderCard) -> str:
    """Return the section with the commands, and what has to be cited."""
    text = f"""\
## Use

```
pip install "nnunet-autoreg[hf]"
autoreg_weights import hf://OWNER/NAME --name {card.name}
export autoreg_weights={card.name}
nnUNetv2_plan_and_preprocess -d DATASET -pl AutoregPlanner -c 3d_fullres
nnUNetv2_train DATASET 3d_fullres 0 -tr AutoregPretrainedTrainer -p AutoregPlans
```

The import takes a downloaded folder as well. Please cite nnU-Net (Isensee et al., Nature Methods
2021), for a Primus encoder also Wald et al. (arXiv 2503.01835), and the sources of the data."""

    origin = card.extra.get(IMPORTED)
    if isinstance(origin, Mapping):
        text += f"\n\nThese weights were imported from another project ({origin.get('format')})."
    return text


def _plain(text: str) -> str:
    """Return a text of somebody else as one line without marks of Markdown tables and HTML."""
    one_line = printable(" ".join(text.split()))
    return one_line.replace("|", "\\|").replace("<", "&lt;")
