"""Editing preference data by a ranking: removing pairs, swapping their sides, dropping sources.

The data streams through in its own schema; what changed is recorded, so that `restore` gives the original back.
Legend: N rows of the data, n rows of a batch.
"""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.atomic import replacing
from pairtrace.engine.change_record import (
    DIGESTS_KEY,
    EDIT_KEY,
    RECORD_KEY,
    SCHEMA_VERSION,
    file_metadata,
    record_batch,
    record_schema,
)
from pairtrace.engine.edit_config import EditConfig, EditSummary
from pairtrace.engine.edit_decision import REMOVE, SWAP, Decision, RankedRows, decide, source_changes
from pairtrace.engine.edited_rows import RowWriter, keep_rows, swap_sides, twin_columns
from pairtrace.engine.pairs import PairSource
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.row_digest import RowDigest
from pairtrace.engine.scored_data import open_scored_data
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.engine.tables import file_digest
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError

logger = logging.getLogger(__name__)


def edit(config: EditConfig, progress: Progress = NULL_PROGRESS) -> EditSummary:
    """Write an edited copy of the data and the record of its changes. The data itself is left as it is.

    Raises:
        ConfigError: the rule asks for more pairs than there are or takes none, the edit would leave nothing, a source
            or column is not there, the sides cannot be swapped, or a file cannot be written.
        DataError: the data is not what the scores rank, or is damaged.
        StoreError: the store is needed (random null) and cannot be read.
    """
    begun = time.perf_counter()
    table = _open_scores(config)
    behavior = table.choose(config.behavior)
    _refuse_to_overwrite(table, config)
    source = _open_data(table, config)
    schema = source.schema()
    count = source.available
    if count > source.rows:
        logger.warning("rows from %d on were not scored (the store has a limit): they stay as they are", source.rows)
    ranked = RankedRows.read(table, behavior, count)
    decision = decide(config, table, behavior, source, schema, ranked, progress)
    twins = twin_columns(schema, source.columns) if config.action == "swap" else ()
    manifest = _manifest(config, behavior, source, table, decision)
    edited_schema = schema.with_metadata({**(schema.metadata or {}), EDIT_KEY: json.dumps(manifest, sort_keys=True)})
    changed_schema = record_schema(schema, manifest)
    progress.start("edit", count, "pairs")
    # Left in this order, the change record is in place before the edited data, which it alone can undo.
    with (
        replacing(config.out) as edited_path,
        replacing(config.changes) as changes_path,
        RowWriter(edited_path, edited_schema) as edited,
    ):
        before, after = RowDigest(schema), RowDigest(schema)
        with RowWriter(changes_path, changed_schema) as changed:
            start = 0
            for batch in source.batches(schema):
                change = decision.change[start : start + batch.num_rows]
                if len(change) < batch.num_rows:
                    break
                kept = keep_rows(swap_sides(batch, change == SWAP, twins), change != REMOVE, edited_schema)
                before.update(batch)
                after.update(kept)
                edited.write(kept)
                changed.write(record_batch(batch, start, change, decision, ranked, changed_schema))
                start += batch.num_rows
                progress.advance(batch.num_rows)
            if start != count:
                raise DataMismatchError(
                    f"the data does not have the {count} rows it had when it was opened; run the edit again"
                )
            digests = {"original": before.hexdigest(), "edited": after.hexdigest()}
            changed.annotate({DIGESTS_KEY.decode(): json.dumps(digests)})
        edited.annotate({RECORD_KEY.decode(): file_digest([changes_path])})
    progress.finish()
    removed, exchanged = (int(np.count_nonzero(decision.change == kind)) for kind in (REMOVE, SWAP))
    return EditSummary(
        out=config.out,
        changes=config.changes,
        action=config.action,
        behavior=behavior,
        rows_before=count,
        rows_after=count - removed,
        removed=removed,
        swapped=exchanged,
        selected_by=decision.reason,
        lowest_score=None if decision.selection is None else decision.selection.lowest,
        estimated_fdr=None if decision.selection is None else decision.selection.fdr,
        swapped_columns=twins,
        dropped=decision.dropped,
        sources=source_changes(decision),
        seconds=time.perf_counter() - begun,
    )


def _open_scores(config: EditConfig) -> ScoresTable:
    """The scores; DataFormatError says so where they and the data have changed places."""
    try:
        return ScoresTable.open(config.scores)
    except DataFormatError as error:
        if config.data is not None and _is_scores(config.data):
            raise DataFormatError(
                f"{config.data}, given as the data, is a scores file, and {config.scores}, given as the scores, is "
                "not: the two look swapped; the data comes first"
            ) from error
        raise


def _is_scores(path: str) -> bool:
    try:
        ScoresTable.open(path, allow_top=True)
    except DataFormatError:
        return False
    return True


def _open_data(table: ScoresTable, config: EditConfig) -> PairSource:
    try:
        return open_scored_data(table, config.data, config.split)
    except DataMismatchError as error:
        if (earlier := _earlier_edit(config.data)) is not None:
            raise DataMismatchError(
                f"{config.data} is itself the result of an edit ({earlier['action']} of {earlier['data']}, "
                f"{earlier['selected_by']}), so its rows are not those that {config.scores} ranks; edit the original, "
                "or extract and score the edited data first"
            ) from error
        raise


def _refuse_to_overwrite(table: ScoresTable, config: EditConfig) -> None:
    """Keep the products out of every input.

    Raises:
        ConfigError: one of them would take the place of an input, or lie in one.
    """
    made_from = table.manifest.get("store_manifest")
    recorded = made_from.get("data") if isinstance(made_from, dict) else None
    inputs = {
        "data": config.data or recorded,
        "scores": config.scores,
        "activation store": config.store or table.manifest.get("store"),
    }
    for name, given in inputs.items():
        if not isinstance(given, str) or not Path(given).exists():
            continue
        place = Path(given).resolve()
        for what, path in (("--out", config.out), ("the change record", config.changes)):
            if place in (Path(path).resolve(), *Path(path).resolve().parents):
                raise ConfigError(f"{what} ({path}) would overwrite or join the {name} {given}; choose another --out")


def _earlier_edit(data: str | None) -> dict[str, Any] | None:
    """What was done to data that is itself the result of an edit."""
    if data is None or not Path(data).is_file() or not data.endswith(".parquet"):
        return None
    metadata = file_metadata(data)
    found: dict[str, Any] | None = json.loads(metadata[EDIT_KEY]) if EDIT_KEY in metadata else None
    return found


def _manifest(
    config: EditConfig, behavior: str, source: PairSource, table: ScoresTable, decision: Decision
) -> dict[str, Any]:
    made_from = table.manifest["store_manifest"]
    return {
        "schema_version": SCHEMA_VERSION,
        "action": config.action,
        "behavior": behavior,
        "selected_by": decision.reason,
        "dropped": list(decision.dropped),
        "data": str(config.data or made_from["data"]),
        "data_fingerprint": source.fingerprint,
        "columns": source.columns,
        "rows_before": len(decision.change),
        "removed": int(np.count_nonzero(decision.change == REMOVE)),
        "swapped": int(np.count_nonzero(decision.change == SWAP)),
        "scores": config.scores,
        "store_manifest": made_from,
        "directions": table.manifest.get("directions"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
