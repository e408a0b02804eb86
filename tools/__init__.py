"""Programs that generate the project's assets; no pipeline stage imports them."""
