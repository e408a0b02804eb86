"""Make training rows of answers that users corrected or approved.

python -m fintune collect                       # all that were asked so far
python -m fintune collect --since 2026-11-01
"""

import argparse
import logging
from collections import Counter

from fintune import paths
from fintune.errors import UserError
from fintune.lineage import project_root
from fintune.params import read_params

log = logging.getLogger("fintune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the date and the check."""
    parser.add_argument(
        "--since", help="a date (2026-11-01); the file's rows from before it stay as they are"
    )
    parser.add_argument(
        "--unchecked", action="store_true", help="do not look for secrets and personal data"
    )


def main(given: argparse.Namespace) -> None:
    """Write the rows, and say what became of the other exchanges."""
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


def _next(sources: list[str]) -> str:
    """Say what trains on the rows."""
    if str(paths.COLLECTED) in sources:
        return "`dvc repro` trains on them"
    return f"""to train on them, add to fetch in params.yaml, then `dvc repro`:

  more:
  - source: {paths.COLLECTED}
    revision:
    config:
    split: train
    share: 1.0
    shape: auto
    turns: last
    columns: {{instruction: instruction, input: input, output: output}}
    default_instruction:
"""
