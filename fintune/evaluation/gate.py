"""The gate: the rules that a model must meet to become champion."""

from typing import Any

from fintune.params import Gate


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

    if (limit := gate.min_perplexity_reduction) is not None:
        low = report["improvement"]["perplexity_reduction"]["low"]
        reason = f"perplexity reduction at least {_shown(low)} (95 %), {limit:g} required"
        rule("min_perplexity_reduction", low is not None and low >= limit, reason)
    if (limit := gate.min_stop_rate) is not None:
        rate = report["tuned"]["stop_rate"]
        rule("min_stop_rate", rate >= limit, f"stop rate {_shown(rate)}, {limit:g} required")
    if (limit := gate.max_loop_rate) is not None:
        rate = report["tuned"]["loop_rate"]
        rule("max_loop_rate", rate <= limit, f"loop rate {_shown(rate)}, {limit:g} allowed")
    if (limit := gate.min_accuracy_gain) is not None:
        low = report["improvement"]["accuracy"]["low"]
        reason = f"right answers up by at least {_shown(low)} (95 %), {limit:g} required"
        if not report["tuned"]["checkable_rows"]:
            reason = "no test row has a result that can be checked"
        rule("min_accuracy_gain", low is not None and low >= limit, reason)
    if (limit := gate.max_forgetting) is not None:
        high = report["forgetting"]["rise"]["high"]
        reason = f"general text's loss up by at most {_shown(high)} (95 %), {limit:g} allowed"
        rule("max_forgetting", high is not None and high <= limit, reason)
    if (limit := gate.max_loss_above_champion) is not None:
        champion = report["champion"]
        if champion["compared"]:
            low = champion["improvement"]["loss"]["low"]
            high = None if low is None else -low
            reason = f"loss above champion's by at most {_shown(high)} (95 %), {limit:g} allowed"
            rule("max_loss_above_champion", high is not None and high <= limit, reason)
        else:
            reason = f"not compared with a champion: {champion['reason']}"
            rule("max_loss_above_champion", not champion["broken"], reason)
    passed = all(each["passed"] for each in rules)
    shown = [each["reason"] for each in rules if each["passed"] == passed] or ["no rule is set"]
    return {
        "passed": passed,
        "reason": f"{'passed' if passed else 'failed'}: {'; '.join(shown)}",
        "rules": rules,
    }


def _shown(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3f}"
