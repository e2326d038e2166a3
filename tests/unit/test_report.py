"""report.html: whole, self-contained, true to scans.csv, and silent about who was scanned."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch

from nnunet_autoreg.corpus.rows import ScanRow, write_index
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    ObjectivePlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.pretrain.display import Gauges, gauges, postfix
from nnunet_autoreg.report import sinks
from nnunet_autoreg.report.curves import Line, chart, thinned
from nnunet_autoreg.report.metrics import MetricsFile, read_lines
from nnunet_autoreg.report.report import REPORT_NAME, Reporter, Setting, verdict
from nnunet_autoreg.report.scans import without_names
from nnunet_autoreg.report.slices import _outline, held_out_pictures, panels
from nnunet_autoreg.sampling.sample import Sample, collate

TINY = encoder_size("primus_tiny")
ARGUMENTS = {**TINY.arguments, "embed_dim": 24, "eva_depth": 1, "eva_numheads": 1}
PLAN = Plan(
    "tiny <run>",
    DataPlan((1.0, 1.0, 2.0)),
    EncoderPlan("primus_tiny", TINY.class_path, ARGUMENTS, TINY.token_size),
    SequencePlan((16, 16, 16)),
    ObjectivePlan(),
    OptimPlan(20, 1, 1e-2, 1),
    RunPlan(0, 10, 10),
    request={"datasets": ["Dataset004_Hippocampus"], "folders": ["/exports/Mueller_Hans"]},
    reasons={"optim.lr": "a reason & more", "encoder.arguments": "small"},
)
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
    real = np.ones((1, 16, 16, 16), bool)
    real[:, :, :, 12:] = False
    samples = [
        Sample(
            np.where(real, generator.normal(size=real.shape), 0).astype(np.float32)[None],
            real,
            np.arange(8),
            prefix,
        )
        for prefix in (1, 4)
    ]
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


VOID = {"meta", "br", "circle", "line", "image", "path", "polyline"}


class Reader(HTMLParser):
    """Checks that tags close in order; collects text by table, attributes and headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.links, self.ids, self.headings, self.named = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [
            given[name]
            for name in ("href", "src", "xlink:href", "srcset", "data", "action")
            if name in given
        ]
        self.ids += [given["id"]] if "id" in given else []
        if given.get("role") == "img":
            self.named.append(given.get("aria-label", ""))
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
        self.links += [value for name, value in attributes if name == "href"]

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "li", "ul"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)


def written(folder, objective, batch):
    reporter = Reporter(folder, PLAN, Setting("cpu", 2, 1))
    reporter.write(
        lambda: held_out_pictures(objective, [batch], torch.device("cpu"), PLAN.data.spacing_mm)
    )
    return (folder / REPORT_NAME).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_refers_to_nothing_outside(run_folder, objective, batch):
    text = written(run_folder, objective, batch)
    page = Reader(text)
    assert [
        link for link in page.links if not link.startswith(("#", "data:image/png;base64,"))
    ] == []
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", text)
    assert len(text) < 1_500_000


def test_its_counts_are_those_of_scans_csv(run_folder, objective, batch):
    page = Reader(written(run_folder, objective, batch))
    counts = Counter(r.status for r in ROWS)
    shown = {cells[0]: cells[1] for cells in page.rows if cells[0] in counts}
    assert (
        shown
        == {"ok": "3", "unreadable": "3", "duplicate": "1"}
        == {status: str(count) for status, count in counts.items()}
    )
    pools = [cells for cells in page.rows if cells[0] in ("input 1 (a folder)", "Dataset004")]
    assert [(cells[0], cells[3]) for cells in pools] == [
        ("input 1 (a folder)", "2"),
        ("Dataset004", "1"),
    ]


def test_no_name_number_or_path_of_a_patient_is_in_it_but_reasons_and_lines_are(
    run_folder, objective, batch
):
    text = written(run_folder, objective, batch)
    assert [secret for secret in SECRETS if secret in text] == []
    reasons = next(cells for cells in Reader(text).rows if cells[0] == "unreadable")[2]
    assert "line 6: [name] cannot be read; copy it again" in reasons
    assert "line 7 and 1 more: a part of it, [name], is missing" in reasons
    assert "line 5: the same voxels as [name]; keep one" in text


def test_names_are_hidden_as_whole_words_only():
    rows = [row(1, case="hip", id="hip", source="/a/b/hip.nii.gz")]
    assert without_names(["hip and hippocampus 1.5/1.5 mm in /x/y.mha"], rows) == [
        "[name] and hippocampus 1.5/1.5 mm in [name]"
    ]


def test_plan_values_stand_beside_their_reasons_and_the_request_with_its_paths_is_left_out(
    run_folder, objective, batch
):
    page = Reader(written(run_folder, objective, batch))
    assert ["optim.lr", "0.01", "a reason & more"] in page.rows
    assert any(
        cells[0] == "sequence.crop_size_vox" and cells[1] == "16 x 16 x 16" for cells in page.rows
    )
    assert not any(cells[0].startswith("request") for cells in page.rows)


def test_the_time_spent_waiting_for_data_is_drawn_and_tabled(run_folder, objective, batch):
    page = Reader(written(run_folder, objective, batch))
    assert [cells[1] for cells in page.rows if cells[0] == "waiting for data"] == ["25 %"]
    assert (
        len([name for name in page.named if name.startswith("Waiting for data, steps 10 to 20: ")])
        == 1
    )


def test_every_picture_has_a_text_that_says_what_it_shows_and_headings_do_not_skip_a_level(
    run_folder, objective, batch
):
    page = Reader(written(run_folder, objective, batch))
    assert len(page.named) == len([n for n in page.named if len(n) > 10]) == 8 + 2 * 2 * 4
    assert (
        "Next-block error, steps 10 to 20: held-out from 0.8 to 0.8; training from 1 to 1; mean "
        "from 1 to 1" in page.named
    )
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert ("h1", "Pretraining: tiny <run>") in page.headings


def test_what_training_said_in_words_is_shown_at_the_top(run_folder, objective, batch):
    text = written(run_folder, objective, batch)
    assert text.index("At step 20: collapse: words &lt;of&gt; warning") < text.index('id="next"')


def test_what_to_type_next_depends_on_where_the_run_stands(run_folder, objective, batch):
    assert "nnUNetv2_plan_and_preprocess -d 4 -pl AutoregPlanner" in written(
        run_folder, objective, batch
    )
    MetricsFile(run_folder / "metrics.jsonl", 15)
    text = written(run_folder, objective, batch)
    assert (
        "nnUNetv2" not in text
        and "last step logged is 10 of 20" in text
        and "type the same autoreg_pretrain line" in text
    )


def test_the_verdict_compares_with_the_better_baseline():
    def said(error, steps=20):
        return verdict(
            PLAN,
            {
                "heldout_error": [(steps, error)],
                "heldout_mean": [(steps, 1.0)],
                "heldout_copy": [(steps, 2.0)],
            },
        )

    assert said(0.8)[0] and said(0.8)[1].startswith("It learns: held-out next-block error 0.800")
    assert "20 % below" in said(0.8)[1]
    assert said(1.2)[1].startswith("It has not learned to predict yet") and not said(1.2)[0]
    assert said(1.2, steps=1)[1].startswith("Too early to say")
    assert verdict(PLAN, {}) == (
        False,
        "Nothing says whether it learns: no scan was held out (that takes two cases or more), or "
        "none "
        "was looked at yet.",
    )


def test_a_perfect_prediction_gives_back_the_truth_and_a_prediction_of_0_the_token_means(
    objective, batch, monkeypatch
):
    tokens = objective._tokens(batch.voxels)
    real = objective._tokens(batch.real[:, :, None])
    mean = (tokens * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
    deviation = (
        ((tokens - mean) * real).square().sum(-1, keepdim=True) / (real.sum(-1, keepdim=True) - 1)
    ).sqrt()
    monkeypatch.setattr(
        objective.model, "forward", lambda batch, valid: (tokens - mean) / deviation
    )
    perfect = objective.reconstruct(batch)
    assert torch.allclose(perfect.predicted, batch.voxels[:, :, 0], atol=1e-5)
    monkeypatch.setattr(objective.model, "forward", lambda batch, valid: torch.zeros_like(tokens))
    nothing = objective.reconstruct(batch)
    assert torch.allclose(nothing.predicted, nothing.trivial)
    corner = batch.voxels[0, 0, 0, :8, :8, :8]
    assert torch.allclose(
        nothing.trivial[0, 0, :8, :8, :8], corner.mean().expand(8, 8, 8), atol=1e-6
    )
    # Of 8 tokens of 8^3 the given ones come first; half of every odd token is padding.
    assert nothing.given[0].sum() == 512 and nothing.given[1].sum() == 2 * 512 + 2 * 256
    assert nothing.scored[1].sum() == 2 * 512 + 2 * 256
    assert not (nothing.scored & ~batch.real).any()


def test_pictures_leave_the_model_in_training_mode_and_the_random_state_alone(objective, batch):
    objective.module.train()
    before = torch.get_rng_state()
    pictures = held_out_pictures(objective, [batch], torch.device("cpu"), (1.0, 1.0, 2.0))
    assert objective.module.training and torch.equal(before, torch.get_rng_state())
    assert [(p.num_given, p.num_blocks) for p in pictures] == [(1, 8), (4, 8)]
    assert [cut.aspect for cut in pictures[0].slices] == [0.5, 0.5]
    assert [title for title, _ in panels(pictures[0].slices[0])] == [
        "true",
        "nothing predicted",
        "predicted",
        "error",
    ]


def test_an_outline_covers_the_region_and_runs_along_its_inner_borders_only():
    region = np.zeros((3, 4), bool)
    region[0, :], region[1, :2] = True, True
    assert _outline(region) == ("M0 0h4v1h-4zM0 1h2v1h-2z", "M2 1v1M2 1h2M0 2h2")


def test_a_chart_keeps_to_240_points_that_are_means_and_skips_what_is_not_finite():
    points = [(float(i), float(i % 2)) for i in range(2400)]
    assert len(thinned(points)) == 240 and {value for _, value in thinned(points)} == {0.5}
    assert chart("t", "u", [Line("a", [(1.0, float("nan"))])]) == ""
    assert chart("t", "u", [Line("a", [(1.0, 2.0)])]).count("<circle") == 1


def test_gauges_tell_tokens_per_second_and_memory_and_no_share_of_a_peak_that_was_not_measured(
    objective, batch
):
    read = gauges(PLAN, objective, torch.device("cpu"), batch).read(0.5)
    assert read["tokens_per_second"] == (16.0, "1/s") and 0.05 < read["peak_memory"][0] < 100
    assert set(read) == {"tokens_per_second", "peak_memory"}
    assert Gauges(torch.device("cpu"), 8, 2e9, 8e9).read(0.5)["share_of_peak"] == (0.5, "1")
    shown = postfix(
        0.51234,
        {
            "tokens_per_second": (123456.0, "1/s"),
            "share_of_peak": (0.5, "1"),
            "peak_memory": (1.26, "GiB"),
        },
    )
    assert shown == {"error": "0.512", "tokens/s": "123k", "peak": "50%", "memory": "1.3GiB"}


def test_a_report_that_fails_is_named_and_ends_nothing_and_the_one_before_stays(run_folder, caplog):
    (run_folder / REPORT_NAME).write_text("the one before")

    def broken():
        raise RuntimeError("no picture")

    Reporter(run_folder, PLAN, Setting("cpu", 2, 1)).write(broken)
    assert (run_folder / REPORT_NAME).read_text() == "the one before"
    assert (
        "report.html could not be written (RuntimeError: no picture); training goes on"
        in caplog.text
    )


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_report
from nnunet_autoreg.report import report
original = Path.write_text
def half(self, text, **options):
    if ".report.html." in self.name:
        original(self, text[: len(text) // 2], **options)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, text, **options)
Path.write_text = half
report.Reporter(Path({folder!r}), test_report.PLAN, report.Setting("cpu", 2, 1)).write(lambda: [])
"""


def test_a_run_killed_while_it_writes_its_report_leaves_the_one_before_whole(
    run_folder, objective, batch
):
    before = written(run_folder, objective, batch)
    script = textwrap.dedent(KILLED).format(tests=os.path.dirname(__file__), folder=str(run_folder))  # noqa: PTH120
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
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
    assert [line["name"] for line in read_lines(tmp_path / "metrics.jsonl")] == [
        "lr",
        "health_warning",
    ]


def test_tensorboard_events_lie_in_the_runs_folder(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv(sinks.SWITCH, raising=False)
    (opened,) = sinks.open_sinks(tmp_path, "t", 0)
    opened.log(7, "train_error", 0.25)
    opened.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_error")] == [(7, 0.25)]


def test_wandb_follows_nnunets_switch_and_a_start_that_fails_costs_one_line(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv(sinks.SWITCH, "0")
    assert sinks.open_sinks(tmp_path, "t", 0) == [] and caplog.text == ""
    monkeypatch.setenv(sinks.SWITCH, "1")
    assert sinks.open_sinks(tmp_path, "t", 0) == []
    assert "W&B could not be started" in caplog.text
    monkeypatch.setenv(sinks.SWITCH, "yes")
    with pytest.raises(sinks.UsageError, match="nnUNet_wandb_enabled=yes: nnU-Net knows 0"):
        sinks.open_sinks(tmp_path, "t", 0)


def test_a_sink_that_fails_is_dropped_with_one_line(caplog):
    class Broken(sinks.Guarded):
        what = "It"

        def _log(self, step, name, value):
            raise OSError("the disk is full")

    broken = Broken()
    broken.log(0, "a", 1.0)
    broken.log(1, "a", 1.0)
    broken.close()
    assert (
        caplog.text.count("It takes no more metrics (the disk is full); the run goes on without it")
        == 1
    )


def test_the_wandb_name_of_a_run_lasts_over_its_continuations(tmp_path):
    assert sinks._lasting_id(tmp_path) == sinks._lasting_id(tmp_path) != ""
    assert json.loads(json.dumps(sinks.QUIET))["init_timeout"] == sinks.SECONDS_TO_WAIT
