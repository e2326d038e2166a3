"""report.html: whole, self-contained, true to scans.csv, and silent about who was scanned."""

import base64
import dataclasses
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from refusals import refused

from nnunet_autoreg.cli import pretrain
from nnunet_autoreg.corpus.rows import ScanRow, write_index
from nnunet_autoreg.model.sequence import to_tokens
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.model.verdict import HEADLINES, LEARNT, NOT_LEARNT, UNKNOWN, judge
from nnunet_autoreg.objective_kinds import figure_of_merit, with_objective
from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.objectives.joint_plan import JointPlan
from nnunet_autoreg.objectives.prediction_plan import (
    AT_ONCE,
    BLOCK_AFTER_BLOCK,
    INTENSITIES,
    PATTERN_ALONE,
    PredictionPlan,
    figure_of,
)
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.pretrain.request import Request
from nnunet_autoreg.pretrain.training_step import Throughput, measure_throughput, postfix
from nnunet_autoreg.report import sinks
from nnunet_autoreg.report.charts import (
    COLOURS,
    Chart,
    Curve,
    description,
    draw,
    error_chart,
    health_charts,
    learning_charts,
    read_series,
    read_units,
    short_number,
    svg,
    thinned,
)
from nnunet_autoreg.report.metrics import MetricsFile, read_lines
from nnunet_autoreg.report.report import (
    DEFAULTS,
    FLAGS,
    REPORT_NAME,
    Reporter,
    RunSetting,
    command_of,
    next_section,
    verdict,
)
from nnunet_autoreg.report.scans import HIDDEN, scans_section
from nnunet_autoreg.report.slices import (
    BORDER_COLOUR,
    panels,
    tinted,
    upright,
    validation_pictures,
)
from nnunet_autoreg.sampling.flip_transpose import FlipTranspose
from nnunet_autoreg.sampling.sample import Sample, collate

TINY = encoder_size("primus_tiny")
ARGUMENTS = {**TINY.arguments, "embed_dim": 24, "eva_depth": 1, "eva_numheads": 1}
PLAN = Plan(
    "tiny <run>",
    DataPlan((1.0, 1.0, 2.0)),
    EncoderPlan("primus_tiny", TINY.class_path, ARGUMENTS, TINY.token_size),
    SequencePlan((16, 16, 16)),
    PredictionPlan(),
    OptimPlan(20, 1, 1e-2, 1),
    RunPlan(0, 10, 10),
    request={"datasets": ["Dataset004_Hippocampus"], "folders": ["/exports/Mueller_Hans"]},
    reasons={"optim.lr": "a reason & more", "encoder.arguments": "small"},
)
# Parts of paths, names and series that must not be in a report.
SECRETS = ("Mueller", "Hans", "PAT-77123", "1.2.840.99", "geheim", "/exports")


def row(number, status="ok", reason="", **changes):
    values = {
        "id": f"Mueller_Hans/PAT-77123_{number}",
        "dataset": "Mueller_Hans",
        "case": f"PAT-77123_{number}",
        "channel": "",
        "modality": "MR",
        "source": f"/exports/Mueller_Hans/PAT-77123_{number}.nii.gz",
        "shape_vox": (16, 16, 16),
        "spacing_mm": (1.0, 1.0, 1.0),
        "cropped_shape_vox": (16, 16, 16),
        "content_hash": "0",
        "status": status,
        "reason": reason,
        "modality_rule": "no intensities like Hounsfield units",
        "part": "series=1.2.840.99.5",
        "subject": "geheim0123456789",
    }
    return ScanRow(**{**values, **changes})


ROWS = (
    row(1),
    row(2),
    row(3, dataset="Dataset004_Hippocampus", channel="MRI"),
    row(4, "duplicate", "the same voxels as Mueller_Hans/PAT-77123_1; keep one"),
    row(5, "unreadable", "/exports/Mueller_Hans/PAT-77123_5.nii.gz cannot be read; copy it again"),
    row(6, "unreadable", "a part of it, Mueller.dcm, is missing"),
    row(7, "unreadable", "a part of it, Mueller.dcm, is missing"),
)


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    return Autoregressive(PLAN)


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    # The last quarter along x is padding.
    valid_mask = np.ones((1, 16, 16, 16), bool)
    valid_mask[:, :, :, 12:] = False
    samples = []
    for prefix in (1, 4):
        noise = generator.normal(size=valid_mask.shape)
        voxels = np.where(valid_mask, noise, 0).astype(np.float32)[None]
        samples.append(Sample(voxels, valid_mask, np.arange(8), prefix))
    return collate(samples)


@pytest.fixture
def run_folder(tmp_path):
    write_index(tmp_path / "scans.csv", ROWS)
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in range(9, 20, 10):
        for name, value in (
            ("train_error", 1.0),
            ("heldout_error", 0.8),
            ("heldout_mean", 1.0),
            ("heldout_copy", 1.9),
            ("lr", 1e-3),
            ("gradient_norm", 0.3),
            ("step_time", 0.5),
            ("tokens_per_second", 16.0),
            ("peak_memory", 1.25),
            ("data_wait", 0.25),
            ("token_variance", 0.4),
            ("effective_rank", 7.0),
            ("probe_features", 0.9),
            ("probe_voxels", 0.6),
        ):
            metrics.log(step, name, value, "1")
    metrics.note(19, "health_warning", "collapse: words <of> warning")
    return tmp_path


VOID = {"meta", "br", "img"}


class PageReader(HTMLParser):
    """Checks that tags close in order; collects text by table, attributes and headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.links = [], [], []
        self.ids, self.headings, self.named = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        for name in ("href", "src", "xlink:href", "srcset", "data", "action"):
            if name in given:
                self.links.append(given[name])
        self.ids += [given["id"]] if "id" in given else []
        if given.get("role") == "img":
            self.named.append(given.get("aria-label", ""))
        if tag == "img":
            self.named.append(given.get("alt", ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append((tag, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given["href"]] if "href" in given else []
        self.ids += [given["id"]] if "id" in given else []

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "li", "ul"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)


def written(folder, objective, batch):
    reporter = Reporter(folder, PLAN, RunSetting("cpu", 2, 1))
    reporter.write(
        lambda: validation_pictures(objective, [batch], torch.device("cpu"), PLAN.data.spacing_mm),
    )
    return (folder / REPORT_NAME).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(run_folder, objective, batch):
    text = written(run_folder, objective, batch)

    page = PageReader(text)

    # Every way in which a page can load something is a link to itself or holds its data.
    inside = [link[1:] for link in page.links if link.startswith("#")]
    outside = [link for link in page.links if not link.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert set(inside) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", text)
    assert len(text) < 250_000


def test_charts_follow_the_dark_page(run_folder, objective, batch):
    text = written(run_folder, objective, batch)

    # Charts take their colours from variables, of which the page has one set for each scheme.
    _, light, dark = re.split(r":root \{", text[: text.index("/* Text. */")])
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    for name, colour in COLOURS.items():
        assert f"--{name}: {colour};" in light
        assert f"--{name}: #" in dark
    assert set(re.findall(r"var\(--(\w+)\)", charts)) == set(COLOURS)
    assert not re.search(r"#[0-9a-f]{6}\b", charts.replace("#m", ""))


def test_its_counts_are_those_of_scans_csv(run_folder, objective, batch):
    page = PageReader(written(run_folder, objective, batch))

    counts = Counter(r.status for r in ROWS)
    shown = {cells[0]: cells[1] for cells in page.rows if cells[0] in counts}
    assert shown == {status: str(count) for status, count in counts.items()}
    assert shown == {"ok": "3", "unreadable": "3", "duplicate": "1"}
    # Of the usable scans two come from a folder, which has no name here, and one from a dataset.
    pools = [cells for cells in page.rows if cells[0] in ("input 1 (a folder)", "Dataset004")]
    assert [(cells[0], cells[3]) for cells in pools] == [
        ("input 1 (a folder)", "2"),
        ("Dataset004", "1"),
    ]


def test_it_names_reasons_and_lines_but_no_patient(run_folder, objective, batch):
    text = written(run_folder, objective, batch)

    for secret in SECRETS:
        assert secret not in text
    # Line numbers are those of scans.csv, sorted by it, with a heading; equal reasons share a line.
    reasons = next(cells for cells in PageReader(text).rows if cells[0] == "unreadable")[2]
    assert "line 6: [name] cannot be read; copy it again" in reasons
    assert "line 7 and 1 more: a part of it, [name], is missing" in reasons
    assert re.search(r"line 5: the same voxels as line [2-4]; keep one", text)


def test_no_ordinary_word_is_hidden_because_a_folder_has_that_name():
    rows = [
        row(1, id="0123456789abcdef", source="/a/voxels/same.nii.gz", case="voxels"),
        row(2, "duplicate", "same voxels as 0123456789abcdef", source="/a/voxels/spacing.nii"),
        row(3, "ignored", "no image endings: 1 .txt", source="/a/endings", case="image"),
    ]

    text = scans_section(rows, 1, 0)

    assert "line 3: same voxels as line 2" in text
    assert "line 4: no image endings: 1 .txt" in text
    assert HIDDEN not in text


def test_plan_values_have_reasons_and_the_request_is_left_out(run_folder, objective, batch):
    page = PageReader(written(run_folder, objective, batch))

    rows = {cells[0]: cells[1:] for cells in page.rows}
    assert rows["optim.lr"] == ["0.01", "a reason & more"]
    assert rows["sequence.crop_size_vox"][0] == "16 x 16 x 16"
    # The request holds paths.
    assert not any(key.startswith("request") for key in rows)


def test_the_time_spent_waiting_for_data_is_drawn_and_tabled(run_folder, objective, batch):
    page = PageReader(written(run_folder, objective, batch))

    assert [cells[1] for cells in page.rows if cells[0] == "waiting for data"] == ["25 %"]
    drawn = "Waiting for data, steps 10 to 20: "
    assert len([name for name in page.named if name.startswith(drawn)]) == 1


def test_every_picture_has_a_text_and_no_heading_level_is_skipped(run_folder, objective, batch):
    page = PageReader(written(run_folder, objective, batch))

    # Two samples with three planes, each true, without prediction, predicted, and its error.
    num_charts = 9
    num_panels = 2 * 3 * 4
    assert len([text for text in page.named if len(text) > 10]) == num_charts + num_panels
    error = (
        "Next-block error, steps 10 to 20: validation from 0.8 to 0.8; training from 1 to 1; mean "
        "at 1; copy at 1.9"
    )
    assert error in page.named

    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert ("h1", "Pretraining: tiny <run>") in page.headings


def test_warnings_of_the_training_are_shown_at_the_top(run_folder, objective, batch):
    text = written(run_folder, objective, batch)

    assert text.index("At step 20: collapse: words &lt;of&gt; warning") < text.index('id="next"')


def test_what_to_type_next_depends_on_how_far_the_run_is(run_folder, objective, batch):
    finished = written(run_folder, objective, batch)
    # Drops what was logged from step 15 on.
    MetricsFile(run_folder / "metrics.jsonl", 15)
    unfinished = written(run_folder, objective, batch)

    assert "nnUNetv2_plan_and_preprocess -d 4 -pl AutoregPlanner" in finished
    assert "nnUNetv2" not in unfinished
    assert "10 of 20" in unfinished
    assert "autoreg_pretrain" in unfinished


def verdict_of(error, steps=20, **others):
    values = {"heldout_error": error, "heldout_mean": 1.0, "heldout_copy": 2.0, **others}
    return verdict(PLAN, {name: [(steps, value)] for name, value in values.items()})


def test_the_verdict_compares_with_the_better_baseline():
    is_good, sentence = verdict_of(0.8)

    # 0.8 is 20 % below the better of the two, 1.0.
    assert is_good
    for value in ("0.800", "1.000", "2.000", "20 %"):
        assert value in sentence


def test_the_verdict_is_bad_above_the_baseline_but_not_during_warmup():
    assert not verdict_of(1.2)[0]
    assert verdict_of(1.2, steps=1)[0]
    assert verdict_of(1.2)[1] != verdict_of(1.2, steps=1)[1]


@pytest.mark.parametrize(
    ("error", "features", "outcome"),
    [(0.8, 0.7, LEARNT), (0.8, 0.5, UNKNOWN), (1.0, 0.7, NOT_LEARNT)],
)
def test_the_report_says_the_same_as_the_card_of_the_encoder(error, features, outcome):
    errors = {"error": error, "copy": 2.0, "mean": 1.0}
    probe = {"features": features, "voxels": 0.6, "chance": 0.3}
    of_card, reason = judge(figure_of_merit(PLAN), errors, probe)

    is_good, sentences = verdict_of(error, probe_features=features, probe_voxels=0.6)

    assert of_card == outcome
    assert is_good == (outcome == LEARNT)
    assert HEADLINES[outcome] in sentences
    assert reason[1:] in sentences


def test_the_verdict_is_bad_without_validation_scans():
    assert not verdict(PLAN, {})[0]


def test_a_perfect_prediction_is_the_truth_and_one_of_0_the_token_means(
    objective,
    batch,
    monkeypatch,
):
    tokens = to_tokens(batch.voxels, objective.token_size)
    valid_mask = to_tokens(batch.valid_mask[:, :, None], objective.token_size)
    # Mean and unbiased deviation of the valid voxels of every token.
    num_valid = valid_mask.sum(-1, keepdim=True)
    mean = (tokens * valid_mask).sum(-1, keepdim=True) / num_valid
    squares = ((tokens - mean) * valid_mask).square().sum(-1, keepdim=True)
    deviation = (squares / (num_valid - 1)).sqrt()
    target = (tokens - mean) / deviation

    monkeypatch.setattr(objective.model, "forward", lambda batch, valid: target)
    perfect = objective.reconstruct(batch)
    monkeypatch.setattr(objective.model, "forward", lambda batch, valid: torch.zeros_like(tokens))
    nothing = objective.reconstruct(batch)

    assert torch.allclose(perfect.predicted, batch.voxels[:, :, 0], atol=1e-5)
    assert torch.allclose(nothing.predicted, nothing.trivial)
    corner = batch.voxels[0, 0, 0, :8, :8, :8].mean().expand(8, 8, 8)
    assert torch.allclose(nothing.trivial[0, 0, :8, :8, :8], corner, atol=1e-6)
    # Of 8 tokens of 8^3 the given ones come first; half of every odd token is padding.
    assert nothing.given[0].sum() == 512
    assert nothing.given[1].sum() == 2 * 512 + 2 * 256
    assert nothing.loss_mask[1].sum() == 2 * 512 + 2 * 256
    assert not (nothing.loss_mask & ~batch.valid_mask).any()


def test_pictures_do_not_change_training_mode_or_random_state(objective, batch):
    objective.module.train()
    before = torch.get_rng_state()

    pictures = validation_pictures(objective, [batch], torch.device("cpu"), (1.0, 1.0, 2.0))

    assert objective.module.training
    assert torch.equal(before, torch.get_rng_state())
    assert [(p.num_given, p.num_blocks) for p in pictures] == [(1, 8), (4, 8)]
    # Voxels are twice as long along x as along z and y.
    planes = pictures[0].planes
    assert [plane.aspect for plane in planes] == [0.5, 0.5, 1.0]
    assert [plane.width_mm for plane in planes] == [32.0, 32.0, 16.0]
    titles = [title for title, _ in panels(planes[0])]
    assert titles == ["true", "nothing predicted", "predicted", "error"]


@pytest.mark.parametrize("scan_axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_planes_are_shown_as_radiologists_view_scans(scan_axes):
    # Axes of the scan run towards superior, anterior and right: its last voxel is the corner there.
    scan = np.arange(4 * 4 * 4, dtype=float).reshape(1, 4, 4, 4)
    stored = scan.transpose(0, *(1 + axis for axis in scan_axes))
    augmentation = FlipTranspose((True, False, True), (0, 2, 1))

    plain = upright(stored, None, scan_axes)
    undone = upright(augmentation.array(stored), augmentation, scan_axes)

    assert plain[0, 0, 0, 0] == scan.max()
    assert plain[0, 0, 1, 0] == scan[0, -1, -2, -1]
    assert np.array_equal(plain, undone)


def test_planes_have_names_letters_and_a_bar_of_10_mm(objective, batch):
    device = torch.device("cpu")
    spacing_mm = (1.0, 1.0, 2.0)
    named = validation_pictures(objective, [batch], device, spacing_mm, (0, 1, 2))[0].planes
    unnamed = validation_pictures(objective, [batch], device, spacing_mm)[0].planes

    assert [plane.name for plane in named] == ["axial", "coronal", "sagittal"]
    assert [plane.edges for plane in named] == ["APRL", "SIRL", "SIAP"]
    html = panels(named[0])[0][1]
    assert '<i class="top">A</i>' in html
    # 10 of 32 mm
    assert 'style="width:31.25%">10 mm' in html
    assert [plane.name for plane in unnamed] == ["y-x plane", "z-x plane", "z-y plane"]
    assert '<i class="top">' not in panels(unnamed[0])[0][1]


def test_the_line_that_started_a_run_is_shown_without_paths():
    request = {
        **PLAN.request,
        "num_steps": 20,
        "split_4d": True,
        "settings": ["run.log_every=2"],
        "seed": 0,
        "encoder": "auto",
    }

    line = command_of(replace(PLAN, name="brain", request=request))
    args = pretrain.parser().parse_args(shlex.split(line)[1:])

    assert (args.datasets, args.num_steps, args.split_4d) == (["4"], 20, True)
    assert args.settings == ["run.log_every=2"]
    assert "-i PATH" in line
    assert "Mueller" not in line
    assert "--seed" not in line


def test_every_field_of_a_request_has_an_option():
    options = {action.dest: action.option_strings for action in pretrain.parser()._actions}
    fields = {field.name for field in dataclasses.fields(Request)} - {"name"}

    assert set(FLAGS) == fields
    for field, flag in FLAGS.items():
        assert flag in options[field]
        default = getattr(Request("x"), field)
        assert default in DEFAULTS.get(field, (None, False, "", ()))


def test_pictures_of_the_folder_and_provenance_are_in_the_page(run_folder, objective, batch):
    (run_folder / "fingerprint.png").write_bytes(b"png")

    text = written(run_folder, objective, batch)

    # "png" in base64 is cG5n; there is no picture of sequences in this folder.
    assert "base64,cG5n" in text
    assert 'id="sequences"' not in text
    rows = {cells[0]: cells[-1] for cells in PageReader(text).rows}
    assert rows["command"].startswith("autoreg_pretrain --name")
    assert "torch" in rows["versions"]
    assert rows["optim.betas"] == "0.9, 0.95"


def test_the_given_part_is_tinted_and_bordered_towards_the_rest_only():
    # Four given rows of five; the last is padding, which is not shown.
    image = np.full((5, 4, 4), 100, np.uint8)
    visible = np.ones((5, 4), bool)
    visible[4] = False
    given = np.zeros((5, 4), bool)
    given[:4] = True

    made = tinted(image, visible, given)

    # 0.72 * 100 + 0.28 * (0, 114, 178)
    assert (made[:2] == (72, 103, 121, 255)).all()
    assert (made[2:4] == (*BORDER_COLOUR, 255)).all()
    assert (made[4, :, 3] == 0).all()
    assert (image == 100).all()


def test_borders_do_not_cover_given_blocks_of_one_thick_slice(objective, batch):
    pictures = validation_pictures(objective, [batch], torch.device("cpu"), (1.0, 1.0, 1.0))
    plane = pictures[0].planes[0]
    # A block one voxel high, as in slices eight times as thick as pixels are wide.
    given = np.zeros(plane.truth.shape, bool)
    given[4, 4:8] = True

    html = panels(replace(plane, given=given, aspect=8.0))[0][1]

    data = re.search(r"base64,([^\"]+)", html)[1]
    pixels = np.rint(255 * imread(io.BytesIO(base64.b64decode(data)))).astype(int)
    num_rows = pixels.shape[0] // given.shape[0]
    num_columns = pixels.shape[1] // given.shape[1]
    block = pixels[4 * num_rows : 5 * num_rows, 4 * num_columns : 8 * num_columns, :3]
    is_border = (block == BORDER_COLOUR).all(axis=-1)
    assert num_rows == 8 * num_columns
    assert 0 < is_border.mean() < 0.3
    assert f"aspect-ratio:{given.shape[1] / (given.shape[0] * 8):.4f}" in html


def test_a_chart_has_at_most_240_points_that_are_means():
    points = [(float(i), float(i % 2)) for i in range(2400)]

    kept = thinned(points)

    # Means over ten points each, five of 0 and five of 1; the last step is kept.
    assert len(kept) == 240
    assert {value for _, value in kept} == {0.5}
    assert kept[-1][0] == 2399


def test_values_that_are_not_finite_are_left_out():
    nan = float("nan")
    inf = float("inf")

    assert learning_charts({"lr": [(1.0, nan), (2.0, inf)]}) == []
    (chart,) = learning_charts({"lr": [(1.0, nan), (2.0, 0.5)]})
    assert list(chart.curves[0].points) == [(2.0, 0.5)]


def test_a_baseline_far_above_the_others_is_named_and_not_drawn():
    # The limit is twice the largest of the other curves, here 2.
    series = {"train_error": [(1.0, 1.0)], "heldout_copy": [(1.0, 1.99)]}
    near = error_chart(series)
    far = error_chart({**series, "heldout_copy": [(1.0, 2.01)]})

    assert [curve.label for curve in near.curves] == ["training", "copy"]
    assert [curve.label for curve in far.curves] == ["training"]
    assert "2.01" in far.note


def axis_of(chart):
    """Return the matplotlib axis that the chart was drawn into."""
    from matplotlib.figure import Figure

    axis = Figure().add_subplot()
    draw(axis, chart)
    return axis


def test_noise_does_not_fill_a_chart_and_the_step_axis_is_the_whole_run():
    series = {"heldout_error": [(5.0, 0.998), (10.0, 0.999)], "heldout_mean": [(5.0, 1.0)]}

    chart = learning_charts(series, PLAN)[0]
    axis = axis_of(chart)

    # Zoomed in, a change of 0.001 would look like learning.
    low, high = axis.get_ylim()
    assert low == 0
    assert high >= 1.05
    assert axis.get_xlim() == (0, PLAN.optim.num_steps)


def test_a_baseline_is_a_level_and_single_points_have_markers():
    series = {"heldout_error": [(5.0, 0.9)], "heldout_mean": [(5.0, 1.1)]}

    error, mean = axis_of(learning_charts(series, PLAN)[0]).get_lines()

    assert list(mean.get_xdata()) == [0, PLAN.optim.num_steps]
    assert list(mean.get_ydata()) == [1.1, 1.1]
    assert (error.get_marker(), error.get_markevery()) == ("o", 1)


def test_health_charts_show_the_limits_of_collapse():
    chart = health_charts({"effective_rank": [(5.0, 40.0)]}, PLAN)[0]

    level = chart.curves[1]

    assert level.is_level
    assert level.points[0][1] == PLAN.run.min_effective_rank


@pytest.mark.parametrize(
    ("predictor", "target", "expected"),
    [
        ("query", "normalised", (BLOCK_AFTER_BLOCK, PATTERN_ALONE)),
        ("query", "normalised_with_statistics", (BLOCK_AFTER_BLOCK, INTENSITIES)),
        ("network", "voxels", (AT_ONCE, INTENSITIES)),
    ],
)
def test_the_text_about_pictures_says_what_was_predicted(predictor, target, expected):
    objective = replace(PLAN.objective, target=target)
    sequence = replace(PLAN.sequence, predictor=predictor, prefix="uniform")

    text = figure_of(replace(PLAN, objective=objective, sequence=sequence)).pictures

    # The sentences that apply, and none of the others.
    every = (BLOCK_AFTER_BLOCK, AT_ONCE, PATTERN_ALONE, INTENSITIES)
    shown = [sentence for sentence in every if sentence in text]
    assert set(shown) == set(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25, "0.25"),
        (0.000025, "2.5e-5"),
        (0.00025, "2.5e-4"),
        (0.0002, "2e-4"),
        (0.001, "0.001"),
        (1500, "1,500"),
        (125_000, "125k"),
        (2_500_000, "2.5M"),
        (0, "0"),
    ],
)
def test_numbers_of_ticks_are_short(value, text):
    assert short_number(value) == text


OWN_MEASURES = {
    "alice": [
        "train_classes",
        "train_patches",
        "train_reconstruction",
        "teacher_entropy_classes",
        "teacher_entropy_patches",
        "prototype_entropy",
        "centre_norm_classes",
        "centre_norm_patches",
        "inlier_rate",
    ],
    "joint": [
        "train_slabs",
        "train_volumes",
        "train_hidden",
        "cluster_entropy",
        "code_entropy",
        "projection_spread",
        "slab_spread",
        "empty_clusters",
        "bank_filled",
    ],
}
FOUR_CURVES = []
for label, look, height in (
    ("validation", "main", 0.6),
    ("training", "second", 0.5),
    ("mean", "base2", 0.8),
    ("copy", "base", 1.4),
):
    points = [(float(i), 0.0718 + height) for i in range(0, 120, 10)]
    FOUR_CURVES.append(Curve(label, points, look))
# The longest labels: a power of ten at the left, and seven digits below.
SMALL_AND_LONG = [(float(i), 1.23e-5 * (i % 7)) for i in range(0, 1_250_000, 10_000)]


@pytest.mark.parametrize("curves", [[Curve("last", SMALL_AND_LONG)], FOUR_CURVES])
def test_no_text_of_a_chart_is_cut_off(curves):
    text = svg(Chart("Learning rate", "", curves))

    _, _, width, _ = map(float, re.search(r'viewBox="([^"]+)"', text)[1].split())
    labels = re.findall(r"<text ([^>]*)>([^<]+)</text>", text)
    for attributes, label in labels:
        x = float(re.search(r'x="([\d.-]+)"', attributes)[1])
        y = float(re.search(r'y="([\d.-]+)"', attributes)[1])
        # A letter of the page's font is at most 7.5 pixels wide, and 11 high.
        reach = 7.5 * len(label)
        anchor = re.search(r"text-anchor:(\w+)", attributes)
        shift = {"middle": 0.5, "end": 1.0}.get(anchor[1] if anchor else "start", 0.0)
        assert x - shift * reach >= 0, label
        assert x + (1 - shift) * reach <= width, label
        assert y - 11 >= 0, label
    assert len(labels) > 8


def test_every_metric_is_drawn_once():
    names = ("lr", "train_error", "heldout_error_spatial", "probe_voxels", "something_new")
    series = {name: [(1.0, 0.5)] for name in (*names, "peak_memory")}

    charts = [*learning_charts(series), *health_charts(series)]

    assert [chart.title for chart in charts] == [
        "Error",
        "Validation error by kind of sequences",
        "Learning rate",
        "Probe on labels",
        "Something new",
    ]


def test_terms_of_the_loss_are_drawn_in_one_chart_with_their_unit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for name in ("train_slabs", "heldout_slabs"):
        metrics.log(0, name, 0.5, "term of the loss")
    metrics.log(0, "bank_filled", 0.5, "share of cases")

    bank, slabs = health_charts(read_series(path), None, read_units(path))

    assert (bank.title, bank.unit) == ("Bank filled", "share of cases")
    assert (slabs.title, slabs.unit) == ("Slabs", "term of the loss")
    assert [curve.label for curve in slabs.curves] == ["validation", "training"]


def test_measures_of_an_objective_are_explained_below_their_charts():
    """Every term of a loss, and every measure that ``health`` returns."""
    for name, measures in OWN_MEASURES.items():
        plan = with_objective(PLAN, name)
        series = {measure: [(1.0, 0.5)] for measure in measures}

        charts = health_charts(series, plan)

        assert len(charts) == len(measures)
        assert [chart.title for chart in charts if not chart.note] == []


def test_a_run_that_has_not_learnt_is_trained_longer_first():
    steps = float(PLAN.optim.num_steps)
    learnt = {"heldout_error": [(steps, 0.4)], "heldout_mean": [(steps, 0.9)]}
    not_learnt = {"heldout_error": [(steps, 0.95)], "heldout_mean": [(steps, 0.9)]}
    setting = RunSetting("cpu", 3, 1)

    assert "--steps" not in next_section(PLAN, learnt, setting)
    html = next_section(PLAN, not_learnt, setting)
    assert html.index("--steps") < html.index("nnUNetv2_train")
    assert "-device cpu" in html


def test_kinds_of_sequences_have_the_unit_of_the_error():
    joint = replace(PLAN, objective=JointPlan("joint"))
    series = {"heldout_error": [(1.0, 4.0)], "heldout_error_views": [(1.0, 4.0)]}

    error, kinds = learning_charts(series, joint)

    assert error.unit == kinds.unit == "nats"


def test_a_chart_is_small_and_the_same_each_time():
    points = [(float(i), float(i % 7)) for i in range(240)]
    chart = Chart("Title <1>", "s", [Curve("a", points)], is_logarithmic=True)

    text = svg(chart)

    assert text == svg(chart)
    assert len(text) < 7000
    assert ">a 1<" in text
    assert text.count(description(chart).replace("<1>", "&lt;1&gt;")) == 2


def test_throughput_knows_no_share_of_a_peak_that_was_not_measured(objective, batch):
    read = measure_throughput(PLAN, objective, torch.device("cpu"), batch).metrics(0.5)
    on_gpu = Throughput(torch.device("cpu"), 8, 2e9, 8e9).metrics(0.5)

    # 8 tokens in half a second.
    assert read["tokens_per_second"] == (16.0, "1/s")
    assert 0.05 < read["peak_memory"][0] < 100
    assert set(read) == {"tokens_per_second", "peak_memory"}
    # 2e9 operations in half a second are 4e9 per second, of 8e9.
    assert on_gpu["share_of_peak"] == (0.5, "1")

    shown = postfix(
        0.51234,
        {
            "tokens_per_second": (123456.0, "1/s"),
            "share_of_peak": (0.5, "1"),
            "peak_memory": (1.26, "GiB"),
        },
    )

    assert shown == "loss 0.512, 120,000 tokens/s, 50 % of peak, 1.3 GiB"


def test_a_report_that_fails_is_logged_and_the_one_before_stays(run_folder, caplog):
    (run_folder / REPORT_NAME).write_text("the one before")

    def broken():
        raise RuntimeError("no picture")

    Reporter(run_folder, PLAN, RunSetting("cpu", 2, 1)).write(broken)

    assert (run_folder / REPORT_NAME).read_text() == "the one before"
    for value in (REPORT_NAME, "RuntimeError", "no picture"):
        assert value in caplog.text


# The process kills itself when half of the page is written to the temporary file.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_report
from nnunet_autoreg.report import report
original = Path.write_text
def half(self, text, **options):
    if ".report.html." in self.name:
        original(self, text[: len(text) // 2], **options)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, text, **options)
Path.write_text = half
setting = report.RunSetting("cpu", 2, 1)
report.Reporter(Path({folder!r}), test_report.PLAN, setting).write(lambda: [])
"""


def test_a_run_killed_while_it_writes_keeps_the_report_before(run_folder, objective, batch):
    before = written(run_folder, objective, batch)

    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent)]
    script = textwrap.dedent(KILLED).format(paths=paths, folder=str(run_folder))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (run_folder / REPORT_NAME).read_text(encoding="utf-8") == before


class Taking:
    def __init__(self, fails=False):
        self.taken, self.fails = [], fails

    def log(self, step, name, value):
        self.taken.append((step, name, value))

    def close(self):
        self.taken.append("closed")


def test_sinks_take_every_number_and_no_sentence(tmp_path):
    sink = Taking()
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, [sink])
    metrics.log(3, "lr", 0.5, "1")
    metrics.note(3, "health_warning", "words")

    metrics.close()

    assert sink.taken == [(3, "lr", 0.5), "closed"]
    names = [line["name"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert names == ["lr", "health_warning"]


def test_tensorboard_events_lie_in_the_runs_folder(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv(sinks.SWITCH, raising=False)
    (opened,) = sinks.open_sinks(tmp_path, "t", 0)
    opened.log(7, "train_error", 0.25)
    opened.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_error")] == [(7, 0.25)]


def test_wandb_follows_nnunets_switch_and_may_fail_to_start(tmp_path, monkeypatch, caplog):
    # Neither package is there: switched off nobody notices, switched on it is a warning.
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv(sinks.SWITCH, "0")

    assert sinks.open_sinks(tmp_path, "t", 0) == []
    assert caplog.text == ""

    monkeypatch.setenv(sinks.SWITCH, "1")

    assert sinks.open_sinks(tmp_path, "t", 0) == []
    assert "W&B could not be started" in caplog.text

    monkeypatch.setenv(sinks.SWITCH, "yes")
    with refused(sinks.UsageError, "wandb-switch", "nnUNet_wandb_enabled=yes"):
        sinks.open_sinks(tmp_path, "t", 0)


def test_a_sink_that_fails_is_dropped_with_one_line(caplog):
    class FullDisk(sinks.Guarded):
        what = "It"

        def _log(self, step, name, value):
            raise OSError("the disk is full")

    broken = FullDisk()
    broken.log(0, "a", 1.0)
    broken.log(1, "a", 1.0)
    broken.close()

    assert caplog.text.count("the disk is full") == 1


def test_the_wandb_name_of_a_run_lasts_over_its_continuations(tmp_path):
    assert sinks._lasting_id(tmp_path) == sinks._lasting_id(tmp_path) != ""
    assert json.loads(json.dumps(sinks.QUIET))["init_timeout"] == sinks.SECONDS_TO_WAIT
