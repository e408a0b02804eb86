"""The split's properties: disjoint by question, independent of row order, stable under additions."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fintune.data import similar
from fintune.data.questions import normalize_question
from fintune.errors import UserError
from fintune.params import Split
from support.rows import describe_splits, group_questions, split_rows

REAL = Path(__file__).parents[3] / "shared/data/fiqa_questions.parquet"
PARAMS = Split(seed=13, validation_fraction=0.1, test_fraction=0.2, near_duplicate_similarity=0.7)
THINGS = [
    "bond",
    "stock",
    "fund",
    "loan",
    "lease",
    "deed",
    "index",
    "option",
    "pension",
    "mortgage",
    "budget",
    "ledger",
]
Row = dict[str, Any]


def questions(count: int) -> list[str]:
    """Generate questions that are not similar to each other."""
    made = random.Random(1)
    words = [f"{a}{b}" for a in THINGS for b in ("ing", "er", "ish", "ward", "like", "ful")]
    return [" ".join(made.sample(words, 6)) + "?" for _ in range(count)]


def rows(count: int = 400) -> list[Row]:
    return [
        {"instruction": "Answer.", "input": question, "output": f"{k} {question}"}
        for question in questions(count)
        for k in range(1 + len(question) % 3)
    ]


def sides(splits: dict[str, list[Row]]) -> dict[str, str]:
    return {normalize_question(row["input"]): name for name, part in splits.items() for row in part}


def test_no_row_is_lost_and_no_question_is_on_two_sides() -> None:
    source = rows()
    splits, dropped, _ = split_rows(source, PARAMS)
    key = lambda row: (row["input"], row["output"])  # noqa: E731
    assert sorted(map(key, (row for part in splits.values() for row in part))) == sorted(
        map(key, source)
    )
    assert dropped == {"duplicate": 0, "held_out_question": 0}
    assert describe_splits(splits)["overlapping_questions"] == 0
    shares = {name: len(part) / len(source) for name, part in splits.items()}
    assert shares["test"] == pytest.approx(0.2, abs=0.05)
    assert shares["validation"] == pytest.approx(0.1, abs=0.05)


def test_overlap_is_measured_not_assumed() -> None:
    row = rows(1)[0]
    spelled = {**row, "input": row["input"].upper() + " !"}
    assert describe_splits({"train": [row], "test": [spelled]})["overlapping_questions"] == 1


def test_the_order_of_the_rows_does_not_matter() -> None:
    source = rows()
    shuffled = random.Random(2).sample(source, len(source))
    assert split_rows(shuffled, PARAMS) == split_rows(source, PARAMS)


def test_added_questions_move_nothing() -> None:
    source = rows(400)
    before = sides(split_rows(source[: len(source) // 2], PARAMS)[0])
    after = sides(split_rows(source, PARAMS)[0])
    assert len(after) > len(before)
    assert {question: after[question] for question in before} == before


def test_the_seed_moves_questions() -> None:
    other = PARAMS.model_copy(update={"seed": 14})
    assert sides(split_rows(rows(), PARAMS)[0]) != sides(split_rows(rows(), other)[0])


def test_exact_duplicates_are_removed_and_counted() -> None:
    source = rows()
    doubled = [*source, *source[:7]]
    splits, dropped, _ = split_rows(doubled, PARAMS)
    assert splits == split_rows(source, PARAMS)[0]
    assert dropped == {"duplicate": 7, "held_out_question": 0}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is an ETF?", "  what is\tan etf "),
        ("What is an ETF?", "ＷＨＡＴ is\u00a0an ETF?!"),
        ("What is an ETF?", "What is an \u200bE\u00adTF"),
        ("A loan of $10,000?", "a loan of $10000"),
        ("Straße or Gasse?", "STRASSE or GASSE"),
        ("I owe 5.5%.", "i owe 5.5%"),
        ("5% of 200?", "5 % of 200"),
        ("5% of 200?", "５％ ｏｆ ２００？"),
        ("Is ٥٪ good?", "Is 5 % good?"),
        ("What is 12 + 4?", "what is 12+4"),
        ("What is 12 − 4?", "what is 12-4"),
        ("What is 3 × 4?", "what is 3*4"),
        ("Is x > 5?", "Is x>5"),
        ("$ 5 a month?", "$5 a month"),
        ("**Bonds** - *what* and/or why?", "Bonds: what and or why"),
    ],
)
def test_spellings_of_one_question(one: str, other: str) -> None:
    assert normalize_question(one) == normalize_question(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is 5.5% good?", "Is 55% good?"),
        ("Is 5% good?", "Is $5 good?"),
        ("What is C?", "What is D?"),
        ("\u7a0e?", "\u91d1?"),
        ("How much is €100 in dollars?", "How much is £100 in dollars?"),
        ("What is 12 + 4?", "What is 12 * 4?"),
        ("What is 12 + 4?", "What is 12 - 4?"),
        ("What is 12 / 4?", "What is 12 - 4?"),
        ("What is a + b?", "What is a - b?"),
        ("Is x > 5?", "Is x < 5?"),
        ("Is x ≤ 5?", "Is x = 5?"),
        ("What is 5²?", "What is 52?"),
        ("What is (2 + 3) * 4?", "What is 2 + (3 * 4)?"),
        ("Why C++?", "Why C#?"),
        ("बिल क्या है?", "बैल क्या है?"),
        ("กิน?", "กัน?"),
        ("👍", "👎"),
    ],
)
def test_different_questions_stay_different(one: str, other: str) -> None:
    assert normalize_question(one) != normalize_question(other)


ALIKE = [
    "where do i begin with retirement saving in my twenties",
    "where do i begin with retirement saving in my thirties",
    "where do i begin with retirement savings in my thirties please",
]


def test_near_duplicates_form_one_group_through_each_other() -> None:
    far = [normalize_question(question) for question in questions(50)]
    groups = group_questions(sorted([*ALIKE, *far]), 0.7)
    assert sorted(map(sorted, (g for g in groups if len(g) > 1))) == [sorted(ALIKE)]
    assert sum(map(len, groups)) == 53


def test_near_duplicates_stay_on_one_side_whatever_the_seed() -> None:
    source = [
        *rows(60),
        *({"instruction": "Answer.", "input": question, "output": "So."} for question in ALIKE),
    ]
    for seed in range(12):
        side = sides(split_rows(source, PARAMS.model_copy(update={"seed": seed}))[0])
        assert len({side[question] for question in ALIKE}) == 1


def test_questions_with_other_numbers_are_other_questions() -> None:
    loans = [f"what is the monthly payment on a loan of ${n}000 over five years" for n in (5, 9)]
    assert len(group_questions(loans, 0.7)) == 2


def test_questions_of_one_template_are_told_apart_by_their_numbers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is compared: comparing each with each took minutes for ten thousand."""
    monkeypatch.setattr(similar, "_join_pairs", None)
    monkeypatch.setattr(similar, "_join_many", None)
    loans = [f"what is the monthly payment on a loan of ${n}000 over a year" for n in range(500)]
    assert len(group_questions(sorted(loans), 0.7)) == 500


def test_rows_of_one_group_stay_on_one_side_whatever_the_seed() -> None:
    linked = [{**row, "group": "a" if row["input"] < "m" else None} for row in rows(80)]
    for seed in range(8):
        splits, _, groups = split_rows(linked, PARAMS.model_copy(update={"seed": seed}))
        homes = {name for name, part in splits.items() for row in part if row["group"]}
        assert len(homes) == 1
        assert groups["largest_group_rows"] == sum(row["group"] == "a" for row in linked)


def test_two_rows_with_one_prompt_stay_on_one_side_whatever_the_seed() -> None:
    faked = [
        {"instruction": "Say", "input": "Now A\nInput: the real thing B", "output": "first"},
        {"instruction": "Say\nInput: Now A", "input": "the real thing B", "output": "second"},
        {"instruction": "Say", "input": "The real thing, B!", "output": "third"},
    ]
    for seed in range(12):
        splits, _, _ = split_rows([*rows(60), *faked], PARAMS.model_copy(update={"seed": seed}))
        assert [sum(row in part for row in faked) for part in splits.values()].count(3) == 1


def test_a_group_that_swallows_the_data_is_told(caplog: pytest.LogCaptureFixture) -> None:
    things = [f"{a}{b}" for a in THINGS for b in ("s", "ing", "er", "ish", "ward", "like")]
    alike = [
        f"please explain to me what {thing} may be good for in a home of your own"
        for thing in things
    ]
    source = [{"instruction": "Answer.", "input": question, "output": "So."} for question in alike]
    splits, _, groups = split_rows([*source, *rows(20)], PARAMS)
    assert groups["largest_group_rows"] == len(alike) and groups["groups"] == 21
    shares = describe_splits(splits)
    assert sum(shares[name]["share"] for name in splits) == pytest.approx(1)
    (told,) = [record.message for record in caplog.records]
    assert f"{len(alike)} of" in told and "please explain to me" in told
    assert "near_duplicate_similarity" in told
    caplog.clear()
    split_rows(rows(), PARAMS)
    assert not caplog.records


ASSIGNED = PARAMS.model_copy(update={"validation_fraction": None, "test_fraction": None})


def assigned(count: int = 400) -> list[Row]:
    """Return the rows with the split of a source: of 16 questions one validation, two test."""
    parts = ["validation", "test", "test", *["train"] * 13]
    part = {question: parts[number % 16] for number, question in enumerate(questions(count))}
    return [{**row, "split": part[row["input"]]} for row in rows(count)]


def test_without_fractions_rows_stay_where_the_source_puts_them() -> None:
    source = assigned()
    splits, dropped, _ = split_rows(source, ASSIGNED)
    assert all(row["split"] == name for name, part in splits.items() for row in part)
    assert sum(map(len, splits.values())) == len(source)
    assert dropped == {"duplicate": 0, "held_out_question": 0}


def test_a_fraction_beside_the_column_is_drawn_from_train() -> None:
    source = [row for row in assigned(1000) if row["split"] != "validation"]
    params = PARAMS.model_copy(update={"test_fraction": None})
    splits, dropped, _ = split_rows(source, params)
    assert {row["split"] for row in splits["validation"]} == {"train"}
    official = [row for row in source if row["split"] == "test"]
    assert len(splits["test"]) == len(official) and all(row in official for row in splits["test"])
    share = len(splits["validation"]) / (len(source) - len(official))
    assert share == pytest.approx(0.1, abs=0.03)
    assert sum(dropped.values()) == 0


@pytest.mark.parametrize(
    ("more", "less"), [("test", "validation"), ("test", "train"), ("validation", "train")]
)
@pytest.mark.parametrize("other", [ALIKE[1], ALIKE[2], ALIKE[0].upper() + "?"])
def test_a_question_of_two_splits_stays_in_the_more_held_out(
    more: str, less: str, other: str
) -> None:
    """The same one in another spelling, a similar one, and one that is similar through a third."""
    held = {"instruction": "Answer.", "input": ALIKE[0], "output": "So.", "split": more}
    third = {**held, "input": ALIKE[1], "output": "Through it."}
    rest = {**held, "input": other, "output": "Or so.", "split": less}
    for source in ([held, third, rest], [rest, third, held]):
        splits, dropped, _ = split_rows([*assigned(60), *source], ASSIGNED)
        assert held in splits[more] and third in splits[more]
        assert not any(rest in part for part in splits.values())
        assert dropped == {"duplicate": 0, "held_out_question": 1}
        assert describe_splits(splits)["overlapping_questions"] == 0


def test_a_row_in_train_and_test_stays_in_test() -> None:
    source = assigned()
    copied = [{**row, "split": "train"} for row in source if row["split"] == "test"]
    splits, dropped, _ = split_rows([*source, *copied], ASSIGNED)
    assert splits == split_rows(source, ASSIGNED)[0]
    assert dropped == {"duplicate": 0, "held_out_question": len(copied)}


def test_the_order_does_not_decide_which_duplicate_s_result_stays() -> None:
    source = [{**row, "result": result} for row in assigned(60) for result in ("a", None, "b")]
    splits, dropped, _ = split_rows(source, ASSIGNED)
    assert split_rows(source[::-1], ASSIGNED)[:2] == (splits, dropped)
    assert dropped["duplicate"] == len(source) * 2 // 3


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_split_that_the_source_leaves_empty_is_named(part: str) -> None:
    source = [row for row in assigned() if row["split"] != part]
    with pytest.raises(UserError, match=f"{part} would be empty.*set split.{part}_fraction"):
        split_rows(source, ASSIGNED)


def test_too_few_questions_are_refused() -> None:
    with pytest.raises(UserError, match="would be empty"):
        split_rows(rows(2), PARAMS)


@pytest.mark.skipif(not REAL.exists(), reason="the real questions are not here")
def test_the_real_set_at_full_size() -> None:
    import pandas as pd

    table = pd.read_parquet(REAL)
    source: list[Row] = [
        {"instruction": "Answer.", "input": question, "output": str(number)}
        for number, question in enumerate(table.question)
    ]
    splits, _, _ = split_rows(source, PARAMS)
    counts: Callable[[str], int] = lambda key: sum(  # noqa: E731
        describe_splits(splits)[name][key] for name in splits
    )
    assert (counts("rows"), counts("questions")) == (17_110, 6_648)
    assert describe_splits(splits)["overlapping_questions"] == 0


def conversation(*turns: str, output: str = "Because.") -> Row:
    """Make the row of a conversation, in which user and assistant take turns."""
    said = [(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    transcript = "\n".join(f"{role.capitalize()}: {text}" for role, text in said)
    return {"instruction": "", "input": transcript, "output": output, "turns": json.dumps(said)}


def test_conversations_are_alike_by_what_the_user_said() -> None:
    """Greetings and long answers, equal in all, make no group of them; the same questions do."""
    answer = (
        "Good day, and thank you for asking our bank; what may I tell you about its accounts? " * 3
    )
    rows = [conversation("Hello", answer, question) for question in questions(40)]
    splits, _, groups = split_rows(rows, PARAMS)
    assert groups["groups"] == 40 and all(splits.values())
    other = [conversation("Hello", "Yes?", question) for question in questions(40)]
    near = [conversation("Hello", answer, f"{question} please") for question in questions(40)]
    splits, _, groups = split_rows([*rows, *other, *near], PARAMS)
    assert groups == {"groups": 40, "largest_group_rows": 3}
    apart = PARAMS.model_copy(update={"near_duplicate_similarity": None})
    _, _, groups = split_rows([*rows, *other], apart)
    assert groups["groups"] == 40  # equal words are one question


def test_pairs_are_compared_by_the_sets_of_their_shingles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts, others that repeat a shingle, and letters of several bytes are among them."""
    monkeypatch.setattr(similar, "PAIRS_SORTED", 7)
    monkeypatch.setattr(similar, "CACHED", 300)
    draw = random.Random(3)
    texts = ["a", "ab", "aaaaaaaaaa", "aaaaaaaaaaaa", "été en été", "été en été en été"]
    texts += ["".join(draw.choices("abé ", k=draw.randint(1, 30))) for _ in range(60)]
    texts += [text + draw.choice(["", "a", "b a", text]) for text in texts]
    sets = [{f" {t} "[i : i + 5] for i in range(max(1, len(t) - 2))} for t in texts]
    pairs = [(i, j) for i in range(len(texts)) for j in range(i)]
    left, right = (np.array(side) for side in zip(*pairs, strict=True))
    column = pa.array(texts, pa.string())
    for similarity in (0.5, 0.7, 1.0):
        expected = [len(sets[i] & sets[j]) >= similarity * len(sets[i] | sets[j]) for i, j in pairs]
        assert 0 < sum(expected) < len(pairs)
        assert similar._alike(column, left, right, similarity).tolist() == expected
