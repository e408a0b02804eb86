"""Metrics, intervals, breakdowns and gate rules, each against a plain computation."""

import math
import random
from typing import Any

import numpy as np
import pytest

from fintune.evaluation.breakdown import break_down, calibration_curve, extremes
from fintune.evaluation.gate import apply_gate
from fintune.evaluation.rows import select_rows
from fintune.evaluation.statistics import Sums, compare, resampled_sums, summarize
from fintune.metrics import METRICS
from fintune.model.likelihood import BINS
from fintune.params import Gate

ROWS = 10
RULES = {
    "min_perplexity_reduction": 0.1,
    "min_stop_rate": 0.9,
    "max_loop_rate": 0.05,
    "min_accuracy_gain": 0.2,
    "max_forgetting": 0.5,
    "max_loss_above_champion": 0.05,
}


def draw_sums(rows: int, seed: int, loss: float = 2.0) -> Sums:
    """Draw every metric's numerators and denominators at random."""
    generator = np.random.default_rng(seed)
    tokens, one = generator.integers(1, 30, rows).astype(float), np.ones(rows)
    nll = generator.gamma(4, loss / 4, rows) * tokens
    sums = {name: (generator.random(rows), one) for name in METRICS}
    return sums | {"loss": (nll, tokens), "perplexity": (nll, tokens)}


def names(rows: int) -> list[str]:
    return [f"question {i}" for i in range(rows)]


def test_metrics_by_hand_on_ten_rows() -> None:
    sums = draw_sums(ROWS, 0)
    nll, tokens = sums["loss"]
    summary = summarize(sums)
    total = sum(float(n) for n in nll) / sum(float(t) for t in tokens)
    assert summary["loss"] == pytest.approx(total)
    assert summary["perplexity"] == pytest.approx(math.exp(total))
    assert summary["rouge_l"] == pytest.approx(sum(float(v) for v in sums["rouge_l"][0]) / ROWS)
    assert set(summary) == set(METRICS)


def test_differences_by_hand_are_signed_so_that_more_is_better() -> None:
    base, tuned = draw_sums(ROWS, 0, loss=3), draw_sums(ROWS, 1, loss=1)
    before, after = summarize(base), summarize(tuned)
    found = compare(base, tuned, names(ROWS), 50, 0)
    assert set(found) == {*METRICS, "perplexity_reduction"}
    for name, metric in METRICS.items():
        change = (after[name] or 0) - (before[name] or 0)
        assert found[name]["value"] == pytest.approx(change * (metric.better or 1))
    assert found["loss"]["value"] > 0 and found["perplexity"]["value"] > 0
    reduction = 1 - (after["perplexity"] or 0) / (before["perplexity"] or 1)
    assert found["perplexity_reduction"]["value"] == pytest.approx(reduction)


def test_intervals_equal_those_of_drawing_rows_one_by_one() -> None:
    """The same draws, with the rows of a drawn question repeated as often as it was drawn."""
    rows, samples = 12, 80
    questions = [f"q{i % 5}" for i in range(rows)]
    base, tuned = draw_sums(rows, 0, loss=3), draw_sums(rows, 1, loss=1)
    found = compare(base, tuned, questions, samples, 7)
    counts = np.random.default_rng(7).multinomial(5, np.full(5, 0.2), size=samples)
    values: dict[str, list[float]] = {"loss": [], "perplexity": [], "rouge_l": []}
    for draw in counts:
        index = [i for i in range(rows) for _ in range(draw[int(questions[i][1:])])]

        def of_draw(sums: Sums, name: str, index: list[int] = index) -> float:
            return float(sums[name][0][index].sum() / sums[name][1][index].sum())

        values["loss"].append(of_draw(base, "loss") - of_draw(tuned, "loss"))
        values["rouge_l"].append(of_draw(tuned, "rouge_l") - of_draw(base, "rouge_l"))
        values["perplexity"].append(
            math.exp(of_draw(base, "loss")) - math.exp(of_draw(tuned, "loss"))
        )
    for name, drawn in values.items():
        low, high = np.percentile(drawn, [2.5, 97.5])
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((low, high), rel=1e-9)


def interval_of_mean(
    values: np.ndarray, questions: list[str], seed: int = 0
) -> tuple[float, float]:
    drawn = resampled_sums(np.stack([values, np.ones(len(values))], 1), questions, 800, seed)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return float(low), float(high)


def test_the_interval_covers_the_mean_and_narrows_with_more_questions() -> None:
    values = np.random.default_rng(0).normal(1.0, 1.0, 400)
    for count in (100, 400):
        low, high = interval_of_mean(values[:count], names(count))
        assert low < values[:count].mean() < high
        assert high - low == pytest.approx(2 * 1.96 / math.sqrt(count), rel=0.25)


def test_rows_of_one_question_are_drawn_together() -> None:
    """Forty equal rows carry no more information than one, so the interval is as wide as for ten rows."""
    values = np.repeat(np.random.default_rng(0).normal(0, 1, 10), 40)
    together = interval_of_mean(values, [str(i // 40) for i in range(400)])
    apart = interval_of_mean(values, names(400))
    assert together[1] - together[0] > 4 * (apart[1] - apart[0])


def test_the_interval_does_not_depend_on_the_order_of_rows_or_on_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, questions = np.random.default_rng(0).normal(0, 1, 50), names(50)
    there = interval_of_mean(values, questions)
    assert interval_of_mean(values[::-1], questions[::-1]) == pytest.approx(there, rel=1e-12)
    assert interval_of_mean(values, questions, seed=1) != there
    monkeypatch.setattr("fintune.evaluation.statistics.DRAWN_AT_ONCE", 120)
    assert interval_of_mean(values, questions) == pytest.approx(there, rel=1e-12)


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    """If two models differ by 0.1 on every row, the interval is a point, however much the rows differ."""
    base = draw_sums(ROWS, 0)
    value, one = base["rouge_l"]
    found = compare(base, base | {"rouge_l": (value + 0.1, one)}, names(ROWS), 100, 0)["rouge_l"]
    assert [found[key] for key in ("value", "low", "high")] == pytest.approx([0.1] * 3)


def test_what_is_not_finite_is_none_and_spoils_no_other_metric() -> None:
    base, tuned = draw_sums(ROWS, 0), draw_sums(ROWS, 1)
    nll, tokens = tuned["loss"]
    broken = np.where(np.arange(ROWS) == 3, np.nan, nll)
    tuned |= {"loss": (broken, tokens), "perplexity": (nll * 1e6, tokens)}
    summary, found = summarize(tuned), compare(base, tuned, names(ROWS), 50, 0)
    assert summary["loss"] is None and summary["perplexity"] is None
    assert found["perplexity_reduction"] == {"value": None, "low": None, "high": None}
    assert found["rouge_l"]["low"] is not None


def rows_of(count: int) -> list[dict[str, Any]]:
    """Build rows with three different answers per question."""
    return [
        {
            "instruction": f"instruction {'abc'[i % 3]}",
            "input": "why " * (i // 3 + 1),
            "output": f"because {i} " + "so " * (i % 7),
            "prompt": f"why {i // 3}",
            "completion": f"because {i}",
        }
        for i in range(count)
    ]


def test_the_chosen_rows_do_not_depend_on_the_order_of_the_table() -> None:
    rows = rows_of(40)
    mixed = random.Random(0).sample(rows, len(rows))
    for count in (None, 7):
        there = select_rows(rows, [r["input"] for r in rows], count)
        assert select_rows(mixed, [r["input"] for r in mixed], count) == there
        assert len(there.rows) == (count or 40)


def test_references_come_from_all_rows_of_the_question() -> None:
    rows = rows_of(9)
    chosen = select_rows(rows, [row["input"] for row in rows], 1)
    assert chosen.questions == [chosen.rows[0]["input"]]
    every = [row["output"] for row in rows if row["input"] == chosen.questions[0]]
    assert chosen.references == [every] and len(every) == 3


def test_the_parts_of_a_breakdown_hold_every_row_once() -> None:
    rows = rows_of(40)
    base, tuned = draw_sums(40, 0), draw_sums(40, 1)
    for kind, parts in break_down(rows, base, tuned).items():
        assert sum(int(part["rows"] or 0) for part in parts) == 40, kind
        assert len(parts) > 1
        labels = [part["label"] for part in parts]
        assert len(set(labels)) == len(labels)
    by_instruction = break_down(rows, base, tuned)["instruction"]
    inside = [i for i, row in enumerate(rows) if row["instruction"] == by_instruction[0]["label"]]
    nll, tokens = tuned["loss"]
    assert by_instruction[0]["rows"] == len(inside) == 14
    assert by_instruction[0]["tuned_loss"] == pytest.approx(
        nll[inside].sum() / tokens[inside].sum()
    )


def test_a_breakdown_of_equal_rows_has_one_part_and_many_templates_are_pooled() -> None:
    rows = [{"input": "why", "output": "so", "instruction": f"i{k}"} for k in range(25)]
    parts = break_down(rows, draw_sums(25, 0), draw_sums(25, 1))
    assert [part["label"] for part in parts["question_words"]] == ["1 word"]
    assert [part["label"] for part in parts["instruction"]][-1] == "15 others"
    assert parts["instruction"][-1]["rows"] == 15


def test_worst_and_best_rows() -> None:
    base, tuned = draw_sums(60, 0), draw_sums(60, 1)
    change = tuned["loss"][0] / tuned["loss"][1] - base["loss"][0] / base["loss"][1]
    worst, best = extremes(base, tuned)
    assert len(worst) == len(best) == 20
    assert change[worst].tolist() == sorted(change.tolist(), reverse=True)[:20]
    assert change[best].tolist() == sorted(change.tolist())[:20]
    assert [len(side) for side in extremes(draw_sums(7, 0), draw_sums(7, 1))] == [3, 3]


def test_calibration_by_hand() -> None:
    """Four tokens at 0.25, one right; six at 0.9, three right: the error is 0.4 x 0 + 0.6 x 0.4."""
    sums = np.zeros((BINS, 3))
    sums[2], sums[9] = (4, 1.0, 1), (6, 5.4, 3)
    curve = calibration_curve(sums)
    assert curve["calibration_error"] == pytest.approx(0.24)
    assert [each["tokens"] for each in curve["bins"]] == [4, 6]
    assert curve["bins"][1]["accuracy"] == 0.5


def a_report(**changes: Any) -> dict[str, Any]:
    """Build the part of a report that the rules read; it meets all of them, except for the changes."""
    values = {"reduction": 0.3, "stops": 0.95, "rise": 0.4, "champion": -0.04}
    values |= {"loops": 0.04, "gain": 0.3, "checkable": 50} | changes
    champion: dict[str, Any] = {
        "compared": True,
        "improvement": {"loss": {"low": values["champion"]}},
    }
    return {
        "improvement": {
            "perplexity_reduction": {"low": values["reduction"]},
            "accuracy": {"low": values["gain"]},
        },
        "tuned": {
            "stop_rate": values["stops"],
            "loop_rate": values["loops"],
            "checkable_rows": values["checkable"],
        },
        "forgetting": {"rise": {"high": values["rise"]}},
        "champion": changes.get("no_champion") or champion,
    }


def broken_rules(report: dict[str, Any], **changes: Any) -> list[str]:
    verdict = apply_gate(report, Gate(**({**RULES, "strict": False} | changes)))
    broken = [rule["rule"] for rule in verdict["rules"] if not rule["passed"]]
    assert verdict["passed"] is (not broken)
    assert verdict["reason"].startswith("failed: " if broken else "passed: ")
    return broken


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"reduction": 0.09}, "min_perplexity_reduction"),
        ({"reduction": None}, "min_perplexity_reduction"),
        ({"stops": 0.89}, "min_stop_rate"),
        ({"loops": 0.06}, "max_loop_rate"),
        ({"gain": 0.19}, "min_accuracy_gain"),
        ({"gain": None, "checkable": 0}, "min_accuracy_gain"),
        ({"rise": 0.51}, "max_forgetting"),
        ({"rise": None}, "max_forgetting"),
        ({"champion": -0.06}, "max_loss_above_champion"),
        ({"champion": None}, "max_loss_above_champion"),
    ],
)
def test_each_rule_is_broken_by_its_own_figure_and_null_switches_it_off(
    change: dict[str, Any], rule: str
) -> None:
    assert broken_rules(a_report(**change)) == [rule]
    assert broken_rules(a_report(**change), **{rule: None}) == []


def test_a_model_at_the_limits_passes() -> None:
    at_limits = a_report(reduction=0.1, stops=0.9, loops=0.05, gain=0.2, rise=0.5, champion=-0.05)
    assert broken_rules(at_limits) == []
    assert broken_rules(a_report(), **dict.fromkeys(RULES)) == []


def test_without_a_champion_its_rule_holds_and_with_one_that_is_out_of_reach_it_does_not() -> None:
    absent = {"compared": False, "broken": False, "reason": "there is none"}
    assert broken_rules(a_report(no_champion=absent)) == []
    assert broken_rules(a_report(no_champion=absent | {"broken": True})) == [
        "max_loss_above_champion"
    ]
