"""Fetch the question-answer records, drop or refuse unusable rows, and write a manifest of their origin."""

import hashlib
import shutil
from pathlib import Path

from fintune import paths
from fintune.data.parts import kept_parts
from fintune.data.sources import fetch_records, is_large
from fintune.params import read_params
from fintune.stage import run, write_json


def main() -> None:
    params = read_params().fetch
    with kept_parts("fetch", is_large(params), [], [params.model_dump()]) as kept:
        about = fetch_records(params, paths.RAW_ROWS, kept)
        paths.RAW_COLLECTED.unlink(missing_ok=True)
        if paths.COLLECTED in [Path(part.source) for part in (params, *params.more)]:
            shutil.copyfile(paths.COLLECTED, paths.RAW_COLLECTED)  # evaluate asks its questions
        with paths.RAW_ROWS.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        origin = {key: about[key] for key in ("source", "revision", "license")}
        write_json(paths.MANIFEST, origin | {"sha256": digest} | about)


if __name__ == "__main__":
    run(main)
