"""Run lm-evaluation-harness, an optional extra (`pip install lm-eval`), on the loaded model."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

from fintune.errors import UserError
from fintune.hub.client import explain_error
from fintune.params import Harness

TASKS = Path(__file__).with_name("tasks")  # the suite `finance`
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
    tasks = load_tasks(params)
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
                    tasks=tasks,
                    task_manager=task_manager(params),
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


def load_tasks(params: Harness) -> list[Any]:
    """Load each task or group with its data, and a tag's tasks one by one.

    Raises:
        UserError: the harness is not installed, does not know a task, or cannot get its data.
    """
    manager = task_manager(params)
    entries = [manager.task_index[name] for name in params.tasks]
    names = [n for e in entries for n in (sorted(e.tags) if e.kind.name == "TAG" else [e.name])]
    tasks = []
    for name in dict.fromkeys(names):
        try:
            found = manager.load([name])
        except Exception as error:  # whatever a task's own code raises
            raise UserError(
                f"evaluate.harness: {name}: {_reason(error, manager.task_index[name].cfg)}; "
                "mend the task, or take it out of evaluate.harness.tasks"
            ) from error
        tasks.append(found["groups"][name] if name in found["groups"] else found["tasks"][name])
    return tasks


def data_sets(tasks: list[Any]) -> dict[str, str]:
    """Return the data set of each loaded task, as ID@REVISION if the task names a revision."""
    named = {}
    for task in tasks:
        for each in task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]:
            revision = (each.get_config("dataset_kwargs") or {}).get("revision")
            path = each.get_config("dataset_path")
            named[each.task_name] = f"{path}@{revision}" if revision else str(path)
    return named


def _reason(error: Exception, config: dict[str, Any] | None) -> str:
    """Explain an error from the hub as for other data sets."""
    path = (config or {}).get("dataset_path") or ""
    if not isinstance(error, OSError) or "/" not in path:
        return f"{type(error).__name__}: {error}"
    from huggingface_hub import auth_check

    told: Exception = error
    try:
        auth_check(path, repo_type="dataset")  # datasets does not pass the hub's own error on
    except Exception as refusal:
        told = refusal
    revision = ((config or {}).get("dataset_kwargs") or {}).get("revision")
    return explain_error(told, "datasets", path, revision)


def task_manager(params: Harness) -> Any:
    """Return the harness's tasks, the suite's and those in `include_path`, which may replace others.

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
            "`lm-eval ls tasks` lists them, finance is a suite of this project, include_path adds a "
            "folder of your own"
        )
    return manager


@cache
def _index(kind: Any, include_path: str | None) -> Any:
    """Index the tasks once: reading thousands of files takes seconds."""
    return kind(include_path=[TASKS, *([include_path] if include_path else [])])
