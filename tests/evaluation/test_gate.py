"""The gate's rules in words: the end of the interval that counts, and never the limit for what misses it."""

from typing import Any

import pytest

from fintune.evaluation.gate import apply_gate, gate_lines
from fintune.params import Gate

RULES = {
    "min_perplexity_reduction": 0.1,
    "min_stop_rate": 0.9,
    "max_loop_rate": 0.05,
    "min_accuracy_gain": 0.5,
    "max_forgetting": 0.5,
    "max_loss_above_champion": 0.05,
}


def judge(fall: float, stops: float, loops: float, gain: float, rise: float) -> dict[str, Any]:
    report = {
        "improvement": {"perplexity_reduction": {"low": fall}, "accuracy": {"low": gain}},
        "tuned": {"stop_rate": stops, "loop_rate": loops, "checkable_rows": 8},
        "forgetting": {"rise": {"high": rise}},
        "champion": {"compared": True, "improvement": {"loss": {"low": -rise}}},
    }
    return apply_gate(report, Gate(**RULES, strict=False))


@pytest.mark.parametrize(
    ("figures", "lines"),
    [
        (
            (0.9849, 1.0, 0.0, 0.567, -0.3204),
            [
                "Gate: passed",
                "  holds   perplexity fell by at least 98.4 % (a fall of 10 % needed)",
                "  holds   100 % of the answers come to an end (90 % needed)",
                "  holds   0 % of the answers end in a loop (5 % allowed)",
                "  holds   the share of right answers rose by at least 56.7 percentage points "
                "(a rise of 50 needed)",
                "  holds   the loss on general text fell by at least 0.32 nats a token "
                "(a rise of 0.5 allowed)",
                "  holds   against the champion's, the loss fell by at least 0.32 nats a token "
                "(a rise of 0.05 allowed)",
            ],
        ),
        (
            (-0.2, 0.89999, 0.05001, -0.0301, 0.50001),
            [
                "Gate: failed",
                "  BROKEN  perplexity may have risen by 20 % (a fall of 10 % needed)",
                "  BROKEN  89.9 % of the answers come to an end (90 % needed)",
                "  BROKEN  5.1 % of the answers end in a loop (5 % allowed)",
                "  BROKEN  the share of right answers may have fallen by 3.1 percentage points "
                "(a rise of 50 needed)",
                "  BROKEN  the loss on general text rose by at most 0.501 nats a token "
                "(a rise of 0.5 allowed)",
                "  BROKEN  against the champion's, the loss rose by at most 0.501 nats a token "
                "(a rise of 0.05 allowed)",
            ],
        ),
    ],
)
def test_each_rule_is_a_sentence(figures: tuple[float, ...], lines: list[str]) -> None:
    assert gate_lines(judge(*figures)) == lines
