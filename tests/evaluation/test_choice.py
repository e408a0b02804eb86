"""The choice of a decoding, from answers that are planted."""

import pytest

from fintune.evaluation.choice import CANDIDATES, choose
from fintune.evaluation.scores import Question
from fintune.generation.decoding import GREEDY, SETTINGS, title
from fintune.generation.generate import Answer

Settings = dict[str, float]
TABLE_OF_TEN = {
    *("greedy", "temperature 0.2, top-p 0.95", "temperature 0.7, top-p 0.95", "temperature 1"),
    *("temperature 1, min-p 0.1", "temperature 0.7, min-p 0.05", "greedy, penalty 1.1"),
    *("greedy, penalty 1.2", "temperature 0.7, top-p 0.95, penalty 1.1"),
}
GOOD = "Put some money aside each month and pay what you owe."
LOOP = "I am not sure if there are any. " * 8
FAVOURITE = "temperature 0.8, min-p 0.1"


def questions(count: int, result: str = "") -> list[Question]:
    return [Question([i, 7], [GOOD], result or GOOD, f"Question {i}?") for i in range(count)]


class Planted:
    """Answers by the decoding's title, and counts them."""

    def __init__(self, texts: dict[str, str], other: str, unfinished: str = "") -> None:
        self.texts, self.other, self.unfinished = texts, other, unfinished
        self.calls: list[int] = []
        self.asked: dict[str, list[list[int]]] = {}

    def __call__(self, prompts: list[list[int]], settings: list[Settings]) -> list[Answer]:
        self.calls.append(len(prompts))
        found = []
        for prompt, each in zip(prompts, settings, strict=True):
            name = title(each)
            self.asked.setdefault(name, []).append(prompt)
            text = self.texts.get(name, self.other)
            found.append(Answer(text, len(text.split()), name not in self.unfinished))
        return found


def test_the_candidates_are_different_and_known_to_other_engines() -> None:
    names = [title(each) for each in CANDIDATES]
    assert len(set(names)) == len(names) == 16 and set(names) >= TABLE_OF_TEN
    assert all(list(each) == list(SETTINGS) for each in CANDIDATES)
    assert names[0] == "greedy" and CANDIDATES[0] == GREEDY


def test_the_most_alike_of_those_that_end_without_loops_is_taken() -> None:
    texts = {"greedy": LOOP, FAVOURITE: GOOD, "temperature 1": GOOD}
    planted = Planted(texts, "Some money.", unfinished="temperature 1")
    found = choose(questions(100), planted, 960)
    assert title(found["settings"]) == FAVOURITE and found["decided_by"] == "likeness"
    assert "the best of those that end and do not loop" in found["reason"]
    first, *_, last = found["candidates"]
    assert first["title"] == FAVOURITE and first["rouge_1"] == 1 and first["loop_rate"] == 0
    assert len(found["candidates"]) == 16
    by_title = {each["title"]: each for each in found["candidates"]}
    assert by_title["greedy"]["loop_rate"] == 1 and by_title["temperature 1"]["stop_rate"] == 0
    assert last["title"] in ("greedy", "temperature 1")


def test_right_answers_decide_where_enough_can_be_checked() -> None:
    right, alike = "It was 12 million dollars.", "It was $13 million."
    asked = [Question([i], ["It was $12 million."], "$12 million", "?") for i in range(100)]
    found = choose(asked, Planted({FAVOURITE: right}, alike), 960)
    assert found["decided_by"] == "accuracy" and title(found["settings"]) == FAVOURITE
    assert found["candidates"][0]["accuracy"] == 1 and found["candidates"][1]["accuracy"] == 0
    few = asked[:29] + questions(71)
    assert choose(few, Planted({FAVOURITE: right}, alike), 960)["decided_by"] == "likeness"


def test_ties_go_to_the_simpler() -> None:
    found = choose(questions(50), Planted({}, GOOD), 960)
    assert title(found["settings"]) == "greedy"
    without = Planted({"greedy": LOOP}, GOOD)
    assert title(choose(questions(50), without, 960)["settings"]) == "temperature 1"


class Noisy(Planted):
    """Answers better or worse by a few prompts."""

    def __init__(self, texts: dict[str, dict[int, str]], other: str) -> None:
        super().__init__({}, other)
        self.of_prompts = texts

    def __call__(self, prompts: list[list[int]], settings: list[Settings]) -> list[Answer]:
        found = []
        for prompt, each in zip(prompts, settings, strict=True):
            texts = self.of_prompts.get(title(each), self.of_prompts.get("", {}))
            found.append(Answer(texts.get(prompt[0], self.other), 5, True))
        return found


FAIR, POOR = "Put some money aside each month.", "Put some money"
BETTER = {3: GOOD, 4: GOOD, 5: POOR}


def test_a_difference_within_one_standard_error_is_a_tie() -> None:
    found = choose(questions(200), Noisy({FAVOURITE: BETTER}, FAIR), 960)
    assert title(found["settings"]) == "greedy"
    assert "within one standard error of" in found["reason"] and FAVOURITE in found["reason"]


def test_a_simpler_one_that_is_hardly_worse_stays_in_the_race() -> None:
    found = choose(questions(200), Noisy({"": BETTER, "greedy": {}}, FAIR), 960)
    assert title(found["settings"]) == "greedy"
    assert found["candidates"][0]["prompts"] == found["candidates"][1]["prompts"]


def test_if_none_ends_the_one_nearest_to_it_is_taken() -> None:
    class Partly(Planted):
        def __call__(self, prompts: list[list[int]], settings: list[Settings]) -> list[Answer]:
            return [
                Answer(GOOD, 5, title(each) == FAVOURITE and prompt[0] % 2 == 0)
                for prompt, each in zip(prompts, settings, strict=True)
            ]

    found = choose(questions(100), Partly({}, ""), 960)
    assert title(found["settings"]) == FAVOURITE
    assert "none ends without loops" in found["reason"]


@pytest.mark.parametrize("budget", [1, 200, 960, 3000])
def test_the_budget_and_the_questions_bound_the_work(budget: int) -> None:
    planted = Planted({FAVOURITE: GOOD}, "Some money.")
    found = choose(questions(70), planted, budget)
    assert len(planted.calls) <= 3  # one batch a round
    assert sum(planted.calls) <= max(budget, 16 * 8)
    for asked in planted.asked.values():
        assert len({tuple(prompt) for prompt in asked}) == len(asked)  # each once
    assert found["candidates"][0]["prompts"] <= 70


def test_few_questions_are_enough() -> None:
    found = choose(questions(1), Planted({FAVOURITE: GOOD}, "Some money."), 960)
    assert title(found["settings"]) == FAVOURITE
