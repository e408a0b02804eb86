"""The pipeline's stages, one script each, run as `python -m stages.NAME` from the project's root."""

from fintune.stage import prepare

prepare()
