"""Teacher decay: what a teacher makes of an answer that the student has begun.

    accuracy(k) = mean over problems of the grader's score of  prefix[:k] + continuation

for three pairs of writers: the teacher after the student's first k tokens, the teacher after the
teacher's, and the student after its own. A sampled prefix that its own writer continues is a sample
of that writer, so the two controls are flat in k up to noise; and the teacher after the student has
to go from the teacher's accuracy to the student's as k grows, if only because answers that are
finished cannot be mended. So `change` is over problems whose answers are still open after k tokens,
against the same writer on the same problems at k = 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from esr_train.diagnose import drawing
from esr_train.diagnose.bench import Bench
from esr_train.diagnose.drawing import plain
from esr_train.diagnose.intervals import by_problem, paired, share
from esr_train.diagnose.section import Result, Section, Shown

# (who continues, who began): what it is called
CONDITIONS = {
    "teacher_after_student": "teacher after the student's prefix",
    "teacher_after_teacher": "teacher after its own prefix",
    "student_after_student": "student after its own prefix",
}


def measure(bench: Bench) -> Result:
    result: Result = {"limit": bench.limit, "scored": bench.scored, "points": []}
    if not bench.scored:
        return result
    begun = {"student": bench.student_answers, "teacher": bench.teacher_answers}
    models = {"student": bench.student, "teacher": bench.teacher.rollout}
    alone = {
        who: bench.accuracy(_answers(bench.write(model, f"{who} from the start", key=("fresh",))))
        for who, model in models.items()
    }
    result["points"].append(_point(bench, 0, {c: alone[c.split("_")[0]] for c in CONDITIONS}, None))
    for k in prefixes(bench.keys.prefixes, bench.limit):
        scores = {}
        for condition in CONDITIONS:
            who, _, whose = condition.split("_")
            texts = begun[whose]
            prefix = [texts.response(row)[:k] for row in range(len(texts.prompts))]
            after = bench.write(
                models[who], f"{who} after {k} tokens of the {whose}", prefix, bench.limit - k, (k,)
            )
            # An answer that its writer has finished stays as it is.
            scores[condition] = bench.accuracy(
                [
                    a if int(texts.lengths[row]) <= k else a + after.response(row)
                    for row, a in enumerate(prefix)
                ]
            )
        is_open = np.all([texts.lengths.numpy() > k for texts in begun.values()], axis=0)
        changes = {c: (scores[c], alone[c.split("_")[0]], is_open) for c in CONDITIONS}
        result["points"].append(_point(bench, k, scores, changes))
    return result


def prefixes(wanted: list[int], limit: int) -> list[int]:
    """Those that leave room for a continuation."""
    return [k for k in wanted if k < limit]


def _answers(batch: Any) -> list[list[int]]:
    return [batch.response(row) for row in range(len(batch.prompts))]


def _point(
    bench: Bench, k: int, scores: dict[str, np.ndarray], changes: dict[str, Any] | None
) -> Result:
    """Accuracies at k, and their changes from k = 0 over the answers that are open at k."""
    samples = bench.samples
    point: Result = {
        "k": k,
        "accuracy": {c: share(by_problem(x, samples)) for c, x in scores.items()},
        "open": 1.0,
    }
    if changes is None:
        return point
    kept = {}
    for condition, (after, before, is_open) in changes.items():
        here = [by_problem(np.where(is_open, x, np.nan), samples) for x in (after, before)]
        kept[condition] = here[0], here[1]
        point["open"] = float(is_open.mean())
    point["change"] = {c: paired(*pair) for c, pair in kept.items()}
    # By how much worse the teacher goes on from the student's text than from its own.
    student, teacher = kept["teacher_after_student"], kept["teacher_after_teacher"]
    point["cost_of_student_text"] = paired(teacher[0], student[0])
    return point


def show(result: Result, folder: Path) -> Shown:
    points = result["points"]
    if not points:
        return Shown(["Not measured: the task has no answers that a grader can check."])
    table = [["k", "open", *CONDITIONS.values(), "cost of the student's text"]]
    for point in points:
        cost = point.get("cost_of_student_text")
        cells = [plain(point["accuracy"][c], 2) for c in CONDITIONS]
        table.append(
            [str(point["k"]), f"{point['open']:.2f}", *cells, plain(cost, 2) if cost else "-"]
        )
    findings = []
    for point in points[1:]:
        cost = point["cost_of_student_text"]
        where = drawing.verdict(cost)
        findings.append(
            f"After {point['k']} tokens, with {point['open']:.0%} of the answers open, going on "
            f"from the student's text instead of its own costs the teacher {plain(cost, 2)} of "
            f"accuracy: {where}, over {cost['problems']} problems."
        )
    return Shown(findings, [("Accuracy of completed answers", table)], [_picture(points, folder)])


def _picture(points: list[Result], folder: Path) -> Any:
    with drawing.styled():
        figure, (left, right) = drawing.figure(360, 2)
        lines = {}
        ks = [float(point["k"]) for point in points]
        width = max(ks) / 90 if len(ks) > 1 else 0.1
        for number, (condition, name) in enumerate(CONDITIONS.items()):
            at = [k + width * (number - 1) for k in ks]
            found = [point["accuracy"][condition] for point in points]
            lines[name] = drawing.draw_line(left, at, found, number)
            changes = [point["change"][condition] for point in points[1:]]
            drawing.draw_line(right, at[1:], changes, number)
        left.set_ylabel("accuracy, all answers")
        left.set_ylim(-0.03, 1.03)
        right.set_ylabel("change from k = 0, open answers")
        drawing.mark_level(right, 0)
        for axis in (left, right):
            axis.set_xlabel("k, tokens of the prefix")
        known = {name: line for name, line in lines.items() if line is not None}
        problems = points[0]["accuracy"]["teacher_after_student"]["problems"]
        caption = (
            f"Left: all answers of {problems} problems; one that ended within k tokens stays as it "
            "is. Right: the same minus the writer's accuracy from the start, on problems where "
            "neither answer had ended. Bars: 95 % bootstrap intervals over problems, on the right "
            "over pairs."
        )
        texts = ("Accuracy of answers continued after k tokens", caption)
        return drawing.picture(figure, known, folder, "teacher_decay", texts)


SECTION = Section(
    name="teacher_decay",
    title="Teacher decay",
    question=(
        "Can the teacher still reach a right answer after the student's first k tokens? Controls: "
        "prefixes of the same length that the teacher wrote, and the student on its own prefixes. "
        "Both controls are flat in k but for noise."
    ),
    measure=measure,
    show=show,
)
