"""Write the demo's finance questions: a hand-written core and computed rows.

    python -m tools.demo_questions --out assets/demo-questions.jsonl

The core (demo_questions_core.jsonl) is prose. Each kind of computed rows has a function in
demo_questions_kinds.py, which draws numbers and computes the answer, and wordings under the same
name in demo_questions_wordings.toml. The output is deterministic, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools.demo_questions_kinds import KINDS, Draw, Kind

HERE = Path(__file__).parent
CORE = HERE / "demo_questions_core.jsonl"
WORDINGS = HERE / "demo_questions_wordings.toml"

SEED = 20
ROWS_PER_KIND = 54  # three rounds of the 6 x 3 pairs of question and answer wordings
DRAWS_PER_ROW = 20  # on average, before a kind is rejected for too few distinct numbers

TOPICS = (
    "budgeting",
    "taxes",
    "retirement accounts",
    "loans and mortgages",
    "investing",
    "insurance",
    "business expenses",
    "banking and credit",
)

INSTRUCTIONS = (
    "Answer this personal finance question in a few plain sentences.",
    "Give a short, clear answer to the following money question.",
    "Reply to this finance question as a helpful and careful expert would.",
    "Explain the answer to this question about money in simple words.",
    "Read the finance question and give a brief, practical answer.",
)

Row = dict[str, str]
Wordings = dict[str, dict[str, list[str]]]


def folded(text: str) -> str:
    """Fold case and remove punctuation, to compare questions."""
    return " ".join("".join(c for c in text.casefold() if c.isalnum() or c == " ").split())


def row(question: str, answer: str) -> Row:
    """Build a record; the instruction depends only on the question, so equal questions share it."""
    digest = hashlib.sha256(question.encode()).digest()
    instruction = INSTRUCTIONS[int.from_bytes(digest[:8], "big") % len(INSTRUCTIONS)]
    return {"instruction": instruction, "input": question, "output": answer}


def core_rows(lines: Iterable[str]) -> Iterator[Row]:
    """Yield every question with each of its answers.

    A question has only one wording: two wordings with the same answer could leak across the split.

    Raises:
        ValueError: a line that is not JSON, lacks a text or a known topic, or repeats a question.
    """
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{CORE.name} line {number}: not JSON, {error}") from None
        question, answers = entry.get("question"), entry.get("answers")
        if entry.get("topic") not in TOPICS or not question or not answers:
            raise ValueError(
                f"{CORE.name} line {number}: needs question, answers and one of the topics "
                f"{', '.join(TOPICS)}; topic is {entry.get('topic')!r}"
            )
        if folded(question) in seen:
            raise ValueError(f"{CORE.name} line {number}: repeated question {question!r}")
        seen.add(folded(question))
        for answer in answers:
            yield row(question, answer)


def kind_rows(kind: Kind, wordings: dict[str, list[str]]) -> Iterator[Row]:
    """Draw rows of one kind, without repeated numbers or questions.

    Raises:
        ValueError: the kind's ranges have too few distinct numbers.
    """
    draw = Draw(random.Random(f"{SEED} {kind.__name__}"))  # kinds do not affect each other
    questions, answers = wordings["questions"], wordings["answers"]
    seen: set[str] = set()
    made = 0
    for _ in range(ROWS_PER_KIND * DRAWS_PER_ROW):
        fields = kind(draw)
        question = questions[made % len(questions)].format(**fields)
        keys = {folded(question), repr(fields)}
        if keys & seen:
            continue
        seen |= keys
        yield row(question, answers[made // len(questions) % len(answers)].format(**fields))
        made += 1
        if made == ROWS_PER_KIND:
            return
    raise ValueError(f"{kind.__name__}: only {made} distinct questions; widen its ranges")


def demo_rows(core: Iterable[str], wordings: Wordings) -> list[Row]:
    """Return all rows: the core in its order, then each kind in the order of KINDS.

    Raises:
        ValueError: a kind without wordings, wordings without a kind, or see the parts.
    """
    unmatched = {kind.__name__ for kind in KINDS} ^ set(wordings)
    if unmatched:
        raise ValueError(f"{WORDINGS.name} and KINDS differ in {', '.join(sorted(unmatched))}")
    rows = list(core_rows(core))
    for kind in KINDS:
        rows.extend(kind_rows(kind, wordings[kind.__name__]))
    return rows


def render() -> str:
    """Render the whole file from the sources beside this module."""
    core = CORE.read_text(encoding="utf-8").splitlines()
    rows = demo_rows(core, tomllib.loads(WORDINGS.read_text(encoding="utf-8")))
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)


def main() -> None:
    """Write the file completely or not at all."""
    parser = argparse.ArgumentParser(description="Write the demo's finance questions.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON Lines file to write")
    out: Path = parser.parse_args().out
    try:
        text = render()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    unfinished = out.with_name(out.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(out)
    print(f"{out}: {text.count(chr(10)):,} rows")


if __name__ == "__main__":
    main()
