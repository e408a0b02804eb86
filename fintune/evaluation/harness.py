"""Run lm-evaluation-harness, an optional extra (`pip install lm-eval`), on the loaded model."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

from fintune.errors import UserError
from fintune.params import Harness

Results = dict[str, dict[str, dict[str, float]]]


def run_harness(
    model: Any,
    tokenizer: Any,
    params: Harness,
    sides: dict[str, Callable[[], AbstractContextManager[Any]]],
    batch_size: int,
    seed: int,
) -> Results:
    """Evaluate each side on the same harness tasks.

    Args:
        model: a causal model with its adapter.
        sides: by name, a context manager that puts the model into that state, such as
            `model.disable_adapter`.

    Returns:
        By task, metric and side, the value, and `SIDE_stderr` if the harness reports it. Empty without
        tasks.

    Raises:
        UserError: the harness is not installed, does not know a task, or cannot get its data.
    """
    if not params.tasks:
        return {}
    manager = task_manager(params)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about an already loaded model
    results: Results = {}
    for side, switched in sides.items():
        with switched():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            try:
                found = simple_evaluate(
                    wrapped,
                    tasks=list(params.tasks),
                    task_manager=manager,
                    limit=params.limit,
                    bootstrap_iters=1000,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                    log_samples=False,
                )
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"evaluate.harness: {', '.join(params.tasks)}: {type(error).__name__}: {error}; "
                    "mend the task, or take it out of evaluate.harness.tasks"
                ) from error
        for task, metrics in (found or {})["results"].items():
            for key, value in metrics.items():
                name, comma, _ = key.partition(",")  # `acc,none`: the metric and its filter
                kind = f"{side}_stderr" if name.endswith("_stderr") else side
                if comma and isinstance(value, int | float):
                    metric = results.setdefault(task, {}).setdefault(
                        name.removesuffix("_stderr"), {}
                    )
                    metric[kind] = float(value)
    return results


def task_manager(params: Harness) -> Any:
    """Return the harness's tasks, including those in `include_path`; fail fast on a wrong parameter.

    Raises:
        UserError: the harness is not installed, the folder is missing, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"evaluate.harness.tasks: {', '.join(params.tasks)}: lm-evaluation-harness is not "
            f"installed ({error}); `pip install lm-eval` adds it, `tasks: []` does without"
        ) from None
    if params.include_path and not Path(params.include_path).is_dir():
        raise UserError(f"evaluate.harness.include_path: {params.include_path}: no such folder")
    manager = _index(TaskManager, params.include_path)
    known = set(manager.all_tasks)
    if unknown := [task for task in params.tasks if task not in known]:
        raise UserError(
            f"evaluate.harness.tasks: {', '.join(unknown)}: not among the harness's tasks; "
            "`lm-eval ls tasks` lists them, include_path adds a folder of your own"
        )
    return manager


@cache
def _index(kind: Any, include_path: str | None) -> Any:
    """Index the tasks once: reading thousands of files takes seconds."""
    return kind(include_path=include_path)
