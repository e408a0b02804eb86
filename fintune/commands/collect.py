"""Make training rows of answers that users corrected or approved.

python -m fintune collect                       # all that were asked so far
python -m fintune collect --since 2026-11-01
python -m fintune collect --measure             # after `dvc repro`: which of them are right now
"""

import argparse
import logging
from collections import Counter
from collections.abc import Callable

from fintune import paths
from fintune.data.unpacking import Row
from fintune.errors import UserError
from fintune.lineage import project_root
from fintune.params import Generation, read_params

log = logging.getLogger("fintune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the date and the check."""
    parser.add_argument(
        "--since", help="a date (2026-11-01); the file's rows from before it stay as they are"
    )
    parser.add_argument(
        "--unchecked", action="store_true", help="do not look for secrets and personal data"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help=f"collect nothing: have {paths.MERGED} answer the collected questions, and compare",
    )


def main(given: argparse.Namespace) -> None:
    """Write the rows, and say what became of the other exchanges; or measure what they changed."""
    if given.measure:
        _measure(lambda: read_params().generation)
        return
    import pyarrow as pa

    from fintune.data.questions import questions_of
    from fintune.data.tables import read_rows, usual_instruction, write_rows
    from fintune.tracking.client import existing_store
    from fintune.usage import collection
    from fintune.usage.exchanges import exchanges, send_waiting
    from fintune.usage.privacy import finder

    since = collection.read_date(given.since) if given.since else None
    test, train = (paths.rows(paths.SPLIT, name) for name in ("test", "train"))
    if not (test.is_file() and train.is_file()):
        raise UserError(f"{test}: not found; `dvc repro split` makes it, `dvc pull` fetches it")
    look = None if given.unchecked else finder()
    root = project_root()
    client = existing_store(root)
    if client is None:
        raise UserError(
            f"no MLflow store here; run this where {paths.MLFLOW_DATABASE} is, or set MLFLOW_TRACKING_URI"
        )
    send_waiting(client, root)
    params = read_params()
    found = collection.collect(
        exchanges(client, since.timestamp() if since else 0.0),
        usual_instruction(train),
        questions_of(read_rows(test, ["input"])),
        params.split.near_duplicate_similarity,
        look,
    )
    rows = collection.kept_rows(paths.COLLECTED, since, found.rows)
    for said in found.told:
        log.warning("left out: %s", said)
    reasons = Counter(row["reason"] for row in found.rows)
    summary = ", ".join(f"{count} {name}" for name, count in sorted(reasons.items())) or "none"
    print(f"{len(found.rows)} rows ({summary})")
    for reason, count in sorted(found.left.items()):
        if count:
            print(f"{count} left out: {reason}")
    if look is None:
        print("not looked for: secrets and personal data (--unchecked)")
    if not rows:
        print(f"nothing to write to {paths.COLLECTED}")
        return
    write_rows(paths.COLLECTED, rows, dict.fromkeys(collection.COLUMNS, pa.string()))
    sources = [part.source for part in (params.fetch, *params.fetch.more)]
    print(f"{paths.COLLECTED} has {len(rows)} rows; {_next(sources)}")


def _measure(given: Callable[[], Generation]) -> None:
    """Print how many collected questions were answered right in their traces, and how many are now."""
    from fintune.data.tables import read_rows
    from fintune.usage.collection import COLUMNS, compare
    from fintune.usage.models import answer, open_model

    if not paths.COLLECTED.is_file():
        raise UserError(f"{paths.COLLECTED}: not found; `python -m fintune collect` makes it")
    rows = read_rows(paths.COLLECTED, COLUMNS)
    opened = open_model(str(paths.MERGED), given)

    def again(row: Row) -> str:
        return answer(opened, row["input"], row["instruction"], lambda text: None).text

    before, after = compare(rows, again)
    print(f"of {len(rows)} collected questions were right: {sum(before)} before, {sum(after)} now")
    for row, was, is_now in zip(rows, before, after, strict=True):
        if not is_now:
            print(f"{row['origin']}: {'right before, ' if was else ''}wrong now")


def _next(sources: list[str]) -> str:
    """Say what trains on the rows."""
    if str(paths.COLLECTED) in sources:
        return "`dvc repro` trains on them"
    return f"""to train on them, add to fetch in params.yaml, then `dvc repro`:

  more:
  - source: {paths.COLLECTED}
    columns: {{instruction: instruction, input: input, output: output}}
"""
