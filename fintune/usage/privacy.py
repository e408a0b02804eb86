"""Secrets and personal data in a text, by detect-secrets and Presidio; an optional extra.

Presidio's recognisers of patterns and check digits run without a language model, which would have to be
downloaded; so names of persons and places are not found.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from fintune.errors import UserError

NEEDED = ("presidio_analyzer", "detect_secrets")
LEAST_SCORE = 0.4  # of Presidio: a telephone number without a word that says so
NOT_PERSONAL = {"URL", "DATE_TIME"}
NOISY = {"Base64HighEntropyString", "HexHighEntropyString"}  # they take words for secrets


def finder() -> Callable[[str], list[str]]:
    """Return a function that names the kinds of secrets and personal data in a text, never their values.

    Raises:
        UserError: the extra is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise UserError(
            "secrets and personal data are looked for with `pip install detect-secrets presidio-analyzer`; "
            "--unchecked collects the rows without"
        )
    analyzer = _analyzer()
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    known: dict[str, Any] = get_mapping_from_secret_type_to_class()  # type: ignore[assignment]
    classes = {each.__name__ for each in known.values()}
    plugins = {"plugins_used": [{"name": name} for name in sorted(classes - NOISY)]}

    def kinds(text: str) -> list[str]:
        with transient_settings(plugins):
            secret = {found.type for line in text.splitlines() for found in scan_line(line)}
        personal = {
            found.entity_type.lower().replace("_", " ")
            for found in analyzer.analyze(text=text, language="en", score_threshold=LEAST_SCORE)
            if found.entity_type not in NOT_PERSONAL
        }
        return sorted(secret | personal)

    return kinds


def _analyzer() -> Any:
    import spacy
    import tldextract
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    # else the recogniser of e-mail addresses fetches a list of domains from the network
    offline = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    tldextract.extract = offline  # type: ignore[assignment]

    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)  # tells of each other language

    class WithoutModel(SpacyNlpEngine):  # type: ignore[misc]
        """Words alone."""

        def load(self) -> None:
            self.nlp = {"en": spacy.blank("en")}  # type: ignore[assignment]

    engine = WithoutModel()
    engine.load()
    registry = RecognizerRegistry()
    registry.load_predefined_recognizers(languages=["en"])
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])
