"""The gate: the rules that a model must meet to become champion."""

import math
from typing import Any

from fintune.params import Gate

FALLEN = {"fell": "fallen", "rose": "risen"}


def apply_gate(report: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Decide whether the tuned model may become champion.

    The rules on answers judge those of the decoding that is shipped. Rules on a confidence interval use its
    end that is worse for the model. The champion rule holds if there
    is no champion, and is broken if the champion could not be fetched.

    Returns:
        `passed`, `reason` in one line, and `rules`: a list of `rule`, `passed` and `reason`.
    """
    rules: list[dict[str, Any]] = []

    def rule(name: str, held: bool | None, reason: str) -> None:
        rules.append({"rule": name, "passed": bool(held), "reason": reason})

    improvement, tuned = report["improvement"], report["tuned"]
    if (limit := gate.min_perplexity_reduction) is not None:
        low = improvement["perplexity_reduction"]["low"]
        moved = _at_least(low, "fell", "rose", 100, " %")
        said = f"perplexity {moved} (a fall of {_of(limit)} needed)"
        rule("min_perplexity_reduction", low is not None and low >= limit, said)
    if (limit := gate.min_stop_rate) is not None:
        rate = tuned["stop_rate"]
        said = f"{_down(100 * rate, 1)} % of the answers come to an end ({_of(limit)} needed)"
        rule("min_stop_rate", rate >= limit, said)
    if (limit := gate.max_loop_rate) is not None:
        rate = tuned["loop_rate"]
        said = f"{_up(100 * rate, 1)} % of the answers end in a loop ({_of(limit)} allowed)"
        rule("max_loop_rate", rate <= limit, said)
    if (limit := gate.min_accuracy_gain) is not None:
        low = improvement["accuracy"]["low"]
        moved = _at_least(low, "rose", "fell", 100, " percentage points")
        said = f"the share of right answers {moved} (a rise of {100 * limit:g} needed)"
        if not tuned["checkable_rows"]:
            said = "no test row has a result that can be checked"
        rule("min_accuracy_gain", low is not None and low >= limit, said)
    if (limit := gate.max_forgetting) is not None:
        high = report["forgetting"]["rise"]["high"]
        moved = _at_most(high, " nats a token")
        said = f"the loss on general text {moved} (a rise of {limit:g} allowed)"
        rule("max_forgetting", high is not None and high <= limit, said)
    if (limit := gate.max_loss_above_champion) is not None:
        champion = report["champion"]
        if champion["compared"]:
            low = champion["improvement"]["loss"]["low"]
            high = None if low is None else -low
            moved = _at_most(high, " nats a token")
            said = f"against the champion's, the loss {moved} (a rise of {limit:g} allowed)"
            rule("max_loss_above_champion", high is not None and high <= limit, said)
        else:
            said = f"not compared with a champion: {champion['reason']}"
            rule("max_loss_above_champion", not champion["broken"], said)
    passed = all(each["passed"] for each in rules)
    shown = [each["reason"] for each in rules if not each["passed"]]
    shown = shown or [f"all {len(rules)} rules hold" if rules else "no rule is set"]
    return {
        "passed": passed,
        "reason": f"{'passed' if passed else 'failed'}: {'; '.join(shown)}",
        "rules": rules,
    }


def gate_lines(gate: dict[str, Any]) -> list[str]:
    """Format the gate of evaluation.json: the verdict, and one line a rule."""
    marks = {True: "holds ", False: "BROKEN"}
    rules = [f"  {marks[each['passed']]}  {each['reason']}" for each in gate["rules"]]
    verdict = "passed" if gate["passed"] else "failed"
    return [f"Gate: {verdict}{'' if rules else ', no rule is set'}", *rules]


def _at_least(low: float | None, up: str, down: str, factor: float, unit: str) -> str:
    """Say how far a figure moved, by the end of its interval that speaks against the model."""
    if low is None:
        return "is not a number"
    if low < 0:
        return f"may have {FALLEN[down]} by {_up(-factor * low, 1)}{unit}"
    return f"{up} by at least {_down(factor * low, 1)}{unit}"


def _at_most(high: float | None, unit: str) -> str:
    """Say how far a loss rose, by the upper end of its interval."""
    if high is None:
        return "is not a number"
    if high < 0:
        return f"fell by at least {_down(-high, 3)}{unit}"
    return f"rose by at most {_up(high, 3)}{unit}"


def _of(share: float) -> str:
    return f"{100 * share:g} %"


def _down(value: float, digits: int) -> str:
    """Round down, so that a figure that misses its limit is not shown as the limit."""
    return f"{math.floor(round(value * 10**digits, 6)) / 10**digits:g}"


def _up(value: float, digits: int) -> str:
    return f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:g}"
