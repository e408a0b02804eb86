"""Score the finance tasks; lm-evaluation-harness loads this file by its path."""

from typing import Any

Verdict = tuple[str, int, int]  # kind of question, right choice, model's choice


def classified(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Take the choice with the highest log-likelihood, and score it against `gold`.

    Args:
        doc: a row with `gold`, and with `kind` where a task asks several kinds of questions.
        results: for each choice, its log-likelihood and whether it is the greedy answer.
    """
    choice = max(range(len(results)), key=lambda index: results[index][0])
    verdict = (doc.get("kind", ""), doc["gold"], choice)
    return {"acc": float(choice == doc["gold"]), "f1": verdict, "f1_macro": verdict}


def weighted_f1(verdicts: list[Verdict]) -> float:
    """Return the F1 of each class, weighted by its rows; of several kinds of questions, the mean."""
    return _f1(verdicts, "weighted")


def macro_f1(verdicts: list[Verdict]) -> float:
    """Return the unweighted mean of the classes' F1; of several kinds of questions, the mean."""
    return _f1(verdicts, "macro")


def _f1(verdicts: list[Verdict], average: str) -> float:
    from sklearn.metrics import f1_score

    scores = []
    for kind in sorted({kind for kind, _, _ in verdicts}):
        golds, choices = zip(*(pair for of, *pair in verdicts if of == kind), strict=True)
        scores.append(f1_score(golds, choices, average=average, zero_division=0))
    return float(sum(scores) / len(scores))


def number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a generated answer by its number."""
    from fintune.evaluation.correctness import is_correct

    return {"exact_match": float(is_correct(doc["answer"], results[0]) is True)}
