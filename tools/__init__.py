"""Programs that make the assets which ship with the project; no pipeline stage imports them."""
