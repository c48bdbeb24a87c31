# SPDX-License-Identifier: Apache-2.0
"""Report of one run in Markdown, and its tables as rows."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from kfloc_ros.evaluation.metrics import RECALL_THRESHOLDS, Accuracy
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.summary import Summary

CAPTIONS = {
    "trajectory.png": "Camera positions seen from above: start, direction, and error along the path.",
    "error.png": "Error of every frame; the band is twice the error that the covariance claims.",
    "recall.png": "Share of frames within x cm and x degrees.",
    "latency.png": "Stage times, and how the latency is distributed.",
    "reliability.png": "Confidence against the share of right poses; wrong poses among the frames that are kept.",
}


def accuracy_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """Return rows (figure, final pose, coarse pose) of the main table; errors only where there is ground truth."""
    final, coarse = summary.accuracy, summary.coarse
    played = "" if summary.played is None else f" answered of {summary.frames_played} played"
    left_out = [("left out, unusable", str(summary.run.left_out), "")] if summary.run.left_out else []
    rows = [
        ("frames", f"{summary.frames}{played}, {final.frames} with truth", ""),
        *left_out,
        ("localized", f"{summary.localized}", f"{summary.coarse_localized}"),
    ]
    if not has_truth(summary):
        return rows
    rows += [
        ("median position error", _cm(final.median_translation_m), _cm(coarse.median_translation_m)),
        ("median rotation error", _deg(final), _deg(coarse)),
    ]
    for name in RECALL_THRESHOLDS:
        label = "within " + name.replace("cm_", " cm, ").replace("deg", " deg")
        rows.append((label, _percent(final.recall[name]), _percent(coarse.recall[name])))
    return rows


def has_truth(summary: Summary) -> bool:
    """Return whether any frame of a run, answered or not, has ground truth."""
    return bool(summary.accuracy.frames or (summary.played is not None and summary.played.frames))


def truth_text(summary: Summary) -> str:
    """Return which poses were the ground truth."""
    return summary.run.poses if has_truth(summary) else "none"


GOOD_SHARE, BAD_SHARE, ANSWERED_SHARE = 0.9, 0.5, 0.9


def verdict_lines(summary: Summary) -> list[tuple[str, str]]:
    """Return (``good``, ``bad`` or an empty text, sentence) on what matters most, for the top of a report."""
    run, stream = summary.run, summary.streaming
    lines = [("bad", "Interrupted: the figures cover the part that was done.")] if run.interrupted else []
    whole = summary.played if summary.played is not None else summary.accuracy
    if whole.frames:
        share = whole.recall["5cm_5deg"]
        what = "played, answered or not," if summary.played is not None else "with ground truth"
        lines.append((
            "good" if share >= GOOD_SHARE else "bad" if share < BAD_SHARE else "",
            f"{_percent(share)} of the {whole.frames} frames {what} are within 5 cm and 5 deg; median error "
            f"{_cm(summary.accuracy.median_translation_m)}, {_deg(summary.accuracy)}.",
        ))  # fmt: skip
    else:
        lines.append(("", f"There is no ground truth: {summary.localized} of {summary.frames} frames have a pose, "
                      f"{summary.states.get('TRACKING', 0)} are TRACKING; no error is known."))  # fmt: skip
    missed = unanswered(summary)
    if missed:
        total = summary.frames + missed
        lines.append(("bad" if summary.frames < ANSWERED_SHARE * total else "",
                      f"{missed} of {total} frames played got no answer: {run.dropped} were dropped for a newer "
                      "one, the rest came before the nodes were ready or never arrived."))  # fmt: skip
    if run.left_out:
        lines.append(("bad", f"{run.left_out} frames of the source could not be used and are in no figure. The first: "
                      f"{run.left_out_first}"))  # fmt: skip
    if summary.accuracy.frames:
        wrong = round(stream.false_ok * summary.accuracy.frames) if math.isfinite(stream.false_ok) else 0
        told = f"{wrong} TRACKING poses are" if wrong else "No TRACKING pose is"
        lines.append(("bad" if wrong else "good", f"{told} more than 10 cm off."))
    if math.isfinite(stream.time_to_first_pose_s):
        lines.append(("", f"The first TRACKING pose came {stream.time_to_first_pose_s:.2f} s after the first frame; "
                      f"{_percent(stream.availability)} of all frames are TRACKING."))  # fmt: skip
    else:
        lines.append(("bad", "No frame is TRACKING."))
    return lines


def unanswered(summary: Summary) -> int:
    """Return the number of frames played that got no answer; 0 for a run that is no replay."""
    return 0 if summary.played is None else summary.frames_played - summary.frames


def timing_rows(summary: Summary) -> list[tuple[str, str]]:
    """Return rows (figure, value) on time and counts."""
    latency = summary.latency_ms
    rows = [
        ("latency p50 / p95 / p99", " / ".join(_ms(latency[key]) for key in ("p50", "p95", "p99"))),
        ("throughput", _number(summary.throughput_hz, "{:.1f} Hz")),
        (
            "received / processed / dropped",
            f"{summary.run.received} / {summary.run.processed} / {summary.run.dropped}",
        ),
        ("states", ", ".join(f"{state} {count}" for state, count in summary.states.items()) or "none"),
    ]
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in summary.stage_ms.items())
    if stages:
        rows.insert(1, ("median stage times [ms]", stages))
    return rows


def streaming_rows(summary: Summary) -> list[tuple[str, str]]:
    """Return rows (figure, value) on the stream of poses."""
    result = summary.streaming
    recovery = " / ".join(_number(result.recovery_s[key], "{:.2f} s") for key in ("p50", "p95"))
    ended = "; lost at the end" if result.lost_at_end else ""
    tf = summary.run.transform
    wrong = [
        ("false OK (TRACKING but > 10 cm off)", _percent(result.false_ok)),
        ("confidently wrong frames", str(result.confidently_wrong)),
    ]
    return [
        ("availability (TRACKING, of all frames)", _percent(result.availability)),
        ("time to first pose", _number(result.time_to_first_pose_s, "{:.2f} s")),
        *(wrong if has_truth(summary) else []),
        ("outages; recovery p50 / p95", f"{result.outages}; {recovery}{ended}"),
        *([("map -> camera on TF at the images' times, median", transform_text(tf))] if tf is not None else []),
    ]


def transform_text(tf: Accuracy) -> str:
    """Return one line on :attr:`RunInfo.transform`."""
    share = _percent(tf.recall["5cm_5deg"])
    return f"{_cm(tf.median_translation_m)}, {_deg(tf)}; {share} within 5 cm, 5 deg"


def consistency_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """Return rows (figure, measured, expected) on the covariance; empty without one."""
    result = summary.consistency
    if result is None:
        return []
    rows = [
        ("NEES mean", f"{result.nees_mean:.2f}", "6"),
        ("NEES median", f"{result.nees_median:.2f}", "5.35"),
        ("NEES below the 95 % quantile", _percent(result.nees_within_95), "95 %"),
    ]
    for name, coverage in (("position", result.translation_coverage), ("rotation", result.rotation_coverage)):
        measured = " / ".join(_percent(coverage[f"{k}sigma"]) for k in (1, 2, 3))
        rows.append((f"{name} errors within 1 / 2 / 3 sigma", measured, "68.3 / 95.4 / 99.7 %"))
    return rows


def report_text(summary: Summary, records: Sequence[FrameRecord], pictures: Sequence[str]) -> str:
    """Return the Markdown text of ``report.md``."""
    run = summary.run
    hardware = ", ".join(f"{key} {value}" for key, value in run.hardware.items() if value is not None)
    lines = [
        f"# {'Replay through the live nodes' if run.kind == 'replay' else 'Localization'}: {run.source}",
        "",
        *(f"- **{text}**" for _, text in verdict_lines(summary)),
        "",
        f"- Command: `{run.command}`",
        f"- Map: `{run.map}`",
        f"- Truth: {truth_text(summary)}; split: {run.split or 'all'}; frames: {run.frames or 'all'}",
        f"- Options: {', '.join(f'{key} {value}' for key, value in run.options.items()) or 'defaults'}",
        f"- Hardware: {hardware}",
        "",
        "## Accuracy",
        "",
        _accuracy_scope(summary),
        "",
        "| | final pose | coarse pose |",
        "|---|---|---|",
        *(f"| {name} | {final} | {coarse} |" for name, final, coarse in accuracy_rows(summary)),
        "",
        *(
            [f"Frames called TRACKING that are 25 cm or 5 degrees off, or worse: {summary.tracking_but_wrong}.", ""]
            if has_truth(summary)
            else []
        ),
        *_played_lines(summary),
        "## As a stream",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in streaming_rows(summary)),
        "",
        "## Time",
        "",
        _latency_scope(summary),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in timing_rows(summary)),
        "",
        *_consistency_lines(summary),
        *_reliability_lines(summary),
        *_worst_lines(records),
    ]
    if pictures:
        lines += ["## Pictures", ""]
        for name in pictures:
            lines += [f"![{CAPTIONS[name]}]({name})", "", CAPTIONS[name], ""]
    return "\n".join(lines).rstrip() + "\n"


def command_line(arguments: Sequence[str]) -> str:
    """Return the command as a user would type it."""
    return shlex.join(["kfloc", *arguments])


def _accuracy_scope(summary: Summary) -> str:
    which = "processed by the nodes" if summary.run.kind == "replay" else "given"
    left_out = summary.frames_without_truth
    without = f" {left_out} frames without truth are left out." if left_out else ""
    return f"Over the frames {which}; a frame without a pose is a failure; recall is strict (<).{without}"


def _latency_scope(summary: Summary) -> str:
    if summary.run.kind == "replay":
        return "Latency: wall time from publishing the image to receiving its pose, over DDS."
    return (
        "Latency: time from the decoded image to the pose, reading the file not counted; "
        "throughput: frames over the wall time of the whole loop, reading included."
    )


def _played_lines(summary: Summary) -> list[str]:
    if summary.played is None:
        return []
    played = summary.played
    shares = ", ".join(f"{name.replace('_', '/')} {_percent(value)}" for name, value in played.recall.items())
    return [
        f"Over all {played.frames} frames played, where a frame that got no answer is a failure: "
        f"{played.localized} localized; {shares}.",
        "",
    ]


def _consistency_lines(summary: Summary) -> list[str]:
    result = summary.consistency
    if result is None:
        return []
    rows = []
    for name, coverage in (("position", result.translation_coverage), ("rotation", result.rotation_coverage)):
        rows.append(f"| {name} | " + " | ".join(_percent(coverage[f"{k}sigma"]) for k in (1, 2, 3)) + " |")
    return [
        "## Covariance",
        "",
        f"Over {result.frames} frames: NEES mean {result.nees_mean:.2f}, median {result.nees_median:.2f} "
        f"(expected 6 and 5.35); {_percent(result.nees_within_95)} below the 95 % quantile.",
        "",
        "| axis errors within | 1 sigma (68.3 %) | 2 sigma (95.4 %) | 3 sigma (99.7 %) |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def reliability_rows(summary: Summary) -> list[tuple[str, str]]:
    """Return rows (figure, value) on the confidence; empty without one."""
    result = summary.reliability
    if result is None:
        return []

    def shown(area: float | None) -> str:
        return "all poses are right, or all wrong" if area is None else f"{area:.3f}"

    return [
        ("poses with errors below 10 cm and 5 deg", _percent(result.right_share)),
        ("mean distance of confidence and share of right poses", _percent(result.calibration_error)),
        ("AUROC of the confidence", shown(result.confidence_auroc)),
        ("AUROC of the standard deviation of the position", shown(result.sigma_auroc)),
        ("area under precision by confidence", f"{result.precision_area:.3f}"),
        ("area under the risk-coverage curve", f"{result.risk_coverage_area:.4f}"),
        ("TRACKING with 50 cm or 10 deg of error, or more", _percent(result.catastrophic_share)),
    ]


def _reliability_lines(summary: Summary) -> list[str]:
    rows = reliability_rows(summary)
    if not rows:
        return []
    table = [f"| {name} | {value} |" for name, value in rows]
    return ["## Confidence", "", "| | |", "|---|---|", *table, ""]


def _worst_lines(records: Sequence[FrameRecord]) -> list[str]:
    from kfloc_ros.evaluation.metrics import pose_error

    known = [(pose_error(r.estimate, r.truth), r) for r in records if r.truth is not None and r.processed]
    worst = sorted(known, key=lambda item: item[0].translation_m, reverse=True)[:5]
    if not worst:
        return []
    lines = ["## Worst frames", "", "| frame | error | state | reason |", "|---|---|---|---|"]
    for error, record in worst:
        size = f"{_cm(error.translation_m)}, {error.rotation_deg:.2f} deg" if record.estimate is not None else "no pose"
        lines.append(f"| {record.index} | {size} | {record.state} | {record.reason.replace('|', '/')} |")
    return [*lines, ""]


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"


def _cm(metres: float) -> str:
    return _number(100 * metres, "{:.2f} cm")


def _deg(result: Accuracy) -> str:
    return _number(result.median_rotation_deg, "{:.2f} deg")


def _percent(share: float) -> str:
    return _number(100 * share, "{:.1f} %")


def _ms(value: float) -> str:
    return _number(value, "{:.0f} ms")
