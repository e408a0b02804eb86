"""Merge the adapter into a plain model, verify it, and register the adapter."""

from pathlib import Path

from fintune import paths
from fintune.export.bom import BOM, write_bom
from fintune.export.card import read_records, write_card
from fintune.export.gguf.llama_cpp import require_packages
from fintune.export.register import register_adapter
from fintune.export.signature import seal, signing_key
from fintune.export.summary import summarise
from fintune.export.verify import export
from fintune.generation.decoding import check_decoding
from fintune.integrity import hash_files, sha256
from fintune.lineage import UPSTREAM, finished_stages, output_hashes, project_root
from fintune.model.adapter import read_training
from fintune.params import read_params
from fintune.registry.recovery import restore_evaluation, run_of_adapter
from fintune.registry.results import log_results
from fintune.stage import log, run, whole_folder, write_json
from fintune.tracking.client import connect


def main() -> None:
    everything = read_params()
    params = everything.merge_export
    if params.gguf:
        require_packages()  # fail fast if one is missing
    key = signing_key()  # fail fast if it is none
    client = connect(project_root())
    run_id = run_of_adapter(client)
    records = read_records()
    decoding = records["evaluation"]["decoding"]
    check_decoding(everything.generation, decoding)
    adapter = read_training(paths.ADAPTER)
    with whole_folder(paths.MERGED) as folder:
        measured = export(folder, adapter, params, decoding)
        write_card(folder, adapter, records, measured, params)
        hashes = hash_files(folder)
        write_bom(
            folder, params.registered_model, adapter, records, measured, hashes, params.license
        )
        seal(folder, hashes | {BOM: sha256(folder / BOM)}, key)
    restore_evaluation(client, run_id)
    outputs = output_hashes(finished_stages(Path.cwd(), UPSTREAM))
    version, aliases, reason = register_adapter(client, run_id, adapter, records, outputs, params)
    report = {
        **measured,
        "registered_model": params.registered_model,
        "version": version,
        "run_id": run_id,
        "aliases": aliases,
    }
    report |= {"not_registered": reason} if reason else {}
    write_json(paths.EXPORT, report)
    log_results(client, run_id, measured, {"merge_export": params.model_dump()}, [paths.EXPORT])
    losses = (measured[key] for key in ("merged_loss", "adapter_loss", "base_loss"))
    log.info("loss merged %.4f, adapter %.4f, base %.4f\n", *losses)
    print(summarise(client))


if __name__ == "__main__":
    run(main)
