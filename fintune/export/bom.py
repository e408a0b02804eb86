"""The bill of materials of a model: CycloneDX 1.6, with base, data, libraries, hardware and results.

The library cyclonedx-python-lib has no model card: that part is added to its JSON, and a test validates the
whole against CycloneDX's schema. The same model gives the same bytes: no time, and a serial number made of
the contents.
"""

import importlib.metadata
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fintune import paths
from fintune.export.pyfunc import PACKAGES
from fintune.hub.client import HASH, stated_license
from fintune.hub.models import is_weights, local_folder
from fintune.integrity import sha256_of
from fintune.metrics import METRICS
from fintune.model.adapter import AdapterInfo
from fintune.params import Base

BOM = "bom.cdx.json"
LICENSE_CHARACTERS = 60  # more is a licence's whole text
MADE_BY = (*PACKAGES, "datasets", "trl", "dvc")  # beside what runs the model


def write_bom(
    folder: Path,
    name: str,
    trained: AdapterInfo,
    records: dict[str, dict[str, Any]],
    measured: dict[str, Any],
    hashes: dict[str, str],
    license: str | None,
) -> None:
    """Write a merged model's bill of materials.

    Args:
        name: of the registered model.
        license: the model's own.
        records: as returned by `card.read_records`.
        measured: as returned by `verify.export`.
        hashes: the SHA-256 of the folder's files.
    """
    run, manifest = records["run"], records["manifest"]
    files = [
        _component(ComponentType.FILE, file, f"file:{file}", sha256=digest)
        for file, digest in hashes.items()
    ]
    said = {"mlflow.run_id": run["run_id"], **run["tags"]}
    said |= {f"parameter.{key}": value for key, value in run["params"].items()}
    model = _component(
        ComponentType.MACHINE_LEARNING_MODEL, name, "model", parts=files, said=said, license=license
    )
    used = [
        _base(trained.base),
        *_data(manifest),
        *_libraries(),
        _component(ComponentType.DEVICE, run["tags"]["hardware"], "hardware"),
    ]
    bom = Bom(components=used)
    bom.metadata.component = model
    bom.register_dependency(model, used)
    content = json.loads(
        make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    )
    del content["metadata"]["timestamp"]
    content["metadata"]["component"]["modelCard"] = _model_card(folder, manifest, records, measured)
    content["serialNumber"] = ""
    same = json.dumps(content, sort_keys=True)
    content["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_OID, same).urn
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / BOM).write_text(text + "\n", encoding="utf-8")


def _component(
    kind: ComponentType,
    name: str,
    reference: str,
    version: str | None = None,
    sha256: str | None = None,
    license: str | None = None,
    purl: PackageURL | None = None,
    parts: list[Component] | None = None,
    said: dict[str, str] | None = None,
) -> Component:
    return Component(
        name=name,
        type=kind,
        bom_ref=reference,
        version=version,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else None,
        licenses=[LicenseFactory().make_from_string(license)] if license else None,
        purl=purl,
        components=parts,
        properties=[
            Property(name=f"fintune:{key}", value=text) for key, text in (said or {}).items()
        ],
    )


def _base(base: Base) -> Component:
    """Describe the base with the hashes of its weights; the hub's cache has them as names."""
    folder = local_folder(base)
    files = sorted(file for file in folder.iterdir() if is_weights(file.name))
    digests = {file: file.resolve().name for file in files}  # of a blob in the hub's cache
    others = [file for file, name in digests.items() if len(name) != 64 or not HASH.fullmatch(name)]
    digests |= zip(others, sha256_of(others), strict=True)
    weights = [
        _component(ComponentType.FILE, file.name, f"base:{file.name}", sha256=digest)
        for file, digest in digests.items()
    ]
    purl = None
    if not base.is_folder:
        owner, _, name = base.model.rpartition("/")
        purl = PackageURL("huggingface", owner or None, name, base.revision)
    return _component(
        ComponentType.MACHINE_LEARNING_MODEL,
        base.model,
        "base",
        version=base.revision,
        license=stated_license(folder),
        purl=purl,
        parts=weights,
    )


def _data(manifest: dict[str, Any]) -> Iterator[Component]:
    """Describe the table of all rows, and each of its sources."""
    sources = [
        _component(
            ComponentType.DATA,
            each["source"],
            f"source:{number}",
            version=each["revision"],
            license=each["license"],
            sha256=each.get("sha256") if "sources" in manifest else None,
        )
        for number, each in enumerate(manifest.get("sources", [manifest]))
    ]
    yield _component(
        ComponentType.DATA,
        str(paths.MANIFEST.parent),
        "data",
        sha256=manifest["sha256"],
        parts=sources,
    )


def _libraries() -> Iterator[Component]:
    """Describe the installed packages that made the model, with those that they need."""
    waiting, seen = list(MADE_BY), set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or optional
        needs = [Requirement(text) for text in found.requires or []]
        waiting += [
            each.name for each in needs if not each.marker or each.marker.evaluate({"extra": ""})
        ]
        about = found.metadata.json
        license = str(about.get("license_expression") or about.get("license") or "")
        yield _component(
            ComponentType.LIBRARY,
            name,
            f"library:{name}",
            version=found.version,
            license=license.strip() if 0 < len(license.strip()) <= LICENSE_CHARACTERS else None,
            purl=PackageURL("pypi", None, name, found.version),
        )


def _model_card(
    folder: Path,
    manifest: dict[str, Any],
    records: dict[str, dict[str, Any]],
    measured: dict[str, Any],
) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    evaluation, training = records["evaluation"], records["training"]
    figures = [
        *(metric(f"tuned.{key}", evaluation["tuned"].get(key), "test") for key in METRICS),
        *(metric(f"base.{key}", evaluation["base"].get(key), "test") for key in METRICS),
        *(metric(key, value, "training") for key, value in training.items()),
        *(metric(key, value, "export") for key, value in measured.items()),
    ]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "architectureFamily": config["model_type"],
            "modelArchitecture": config["architectures"][0],
            "datasets": [{"ref": "data"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": [each for each in figures if each]},
    }


def metric(kind: str, value: Any, part: str) -> dict[str, str] | None:
    """Return a figure as CycloneDX has it; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return {"type": kind, "value": f"{value:.6g}", "slice": part}


def read_bom(folder: Path) -> dict[str, Any] | None:
    """Read a folder's bill of materials; None if it has none."""
    file = folder / BOM
    if not file.is_file():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
