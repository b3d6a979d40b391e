"""Write shards and their manifest. One process writes each file, which gets its name only once it is complete.

A manifest is {"source", "date", ..., "samples", "shards": {name: {"samples", "bytes", "sha256"}}}, in
``manifest.json`` beside the shards. It is written last: a folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from datetime import date
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

from rich.progress import track
from webdataset import TarWriter

from common.paths import written_whole

MANIFEST = "manifest.json"
RECORDS = ".finished"  # folder of one record per finished shard, until the manifest replaces them

Entry = dict[str, Any]
Reject = tuple[str, str, str]
"""(what was left out, why, the reason by which it is counted)."""


def digest(path: Path) -> Entry:
    """{"bytes": size, "sha256": hex} of a file."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> Entry:
    """Write a shard, which gets its name only once it is complete; returns its entry for the manifest.

    samples: ``__key__`` and the bytes of each member. Equal samples give equal files.
    """
    count = 0
    with written_whole(path) as unfinished:
        with open(unfinished, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in samples:
                tar.write(sample)
                count += 1
        return {"samples": count, **digest(unfinished)}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, which has its name only once it is whole."""
    with written_whole(path) as unfinished:
        # A file's name may be no valid Unicode; what replaces it is JSON's own escape.
        unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False), errors="backslashreplace")


def write_manifest(folder: Path, shards: Mapping[str, Entry], source: str, **facts: Any) -> None:
    """Write ``manifest.json``; ``source`` and ``facts`` describe the samples."""
    samples = sum(entry["samples"] for entry in shards.values())
    about = {"source": source, "date": date.today().isoformat(), **facts}
    write_json(folder / MANIFEST, {**about, "samples": samples, "shards": dict(shards)})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None. ValueError: it cannot be read."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
        return {**manifest, "shards": dict(manifest["shards"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a manifest ({error!r}); remove it and write it again") from error


def compare_digests(folder: Path, shards: Mapping[str, Entry]) -> None:
    """Read shards again. ValueError: one is missing, or not the one that the manifest lists."""

    def is_wrong(name: str) -> bool:
        path = folder / name
        return not path.is_file() or digest(path) != {key: shards[name][key] for key in ("bytes", "sha256")}

    with ThreadPoolExecutor() as pool:
        wrong = [name for name, bad in zip(shards, pool.map(is_wrong, shards), strict=True) if bad]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(shards)} shards in {folder} are missing or changed since {MANIFEST} was written, "
            f"first {wrong[0]}; copy them again, or remove {MANIFEST} and run this command again"
        )


def pack(
    folder: Path,
    jobs: Mapping[str, Any],
    write: Callable[[Path, Any], tuple[Entry, list[Reject]]],
    *,
    plan: str,
    most_rejected: int,
    workers: int | None = None,
) -> tuple[dict[str, Entry], list[Reject]]:
    """Run ``write(folder / name, job)`` for every job in worker processes; returns all entries and rejects.

    Every finished shard leaves a record, so that a restarted run skips it. The caller removes the records after it
    has written the manifest (``forget_records``).

    plan: a hash of all jobs; records of another plan are refused.
    ValueError: records of another plan, or more than ``most_rejected`` rejects (the run stops there).
    """
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tar.*"):
        leftover.unlink()
    records = {name: record for name in jobs if (record := _record(folder, name, plan))}
    rejected = sum(len(record["rejected"]) for record in records.values())
    pool = ProcessPoolExecutor(workers, initializer=_end_with_parent)
    try:
        futures: dict[Future, str] = {
            pool.submit(_finish, write, folder, name, job, plan): name
            for name, job in jobs.items()
            if name not in records
        }
        for future in track(as_completed(futures), f"{len(futures)} of {len(jobs)} shards", len(futures)):
            record = records[futures[future]] = future.result()
            rejected += len(record["rejected"])
            if rejected > most_rejected:
                break
    finally:
        pool.shutdown(cancel_futures=True)
    rejects = [tuple(reject) for name in jobs if name in records for reject in records[name]["rejected"]]
    if rejected > most_rejected:
        what, why, _ = rejects[-1]
        raise ValueError(
            f"{rejected} samples cannot be used, above the {most_rejected} that --max-rejected allows; "
            f"last {what}: {why}; mend the source, or raise --max-rejected"
        )
    return {name: records[name]["entry"] for name in jobs}, rejects


def forget_records(folder: Path) -> None:
    """Remove the records of finished shards; the manifest has replaced them."""
    shutil.rmtree(folder / RECORDS, ignore_errors=True)


def _record(folder: Path, name: str, plan: str) -> dict[str, Any] | None:
    file = folder / RECORDS / f"{name}.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text())
    if record["plan"] != plan:
        raise ValueError(
            f"{folder} holds shards of an unfinished run over another source or with other options; finish that "
            f"run with its own command, choose another folder, or remove {folder / RECORDS} to begin again"
        )
    path = folder / name
    return record if path.is_file() and path.stat().st_size == record["entry"]["bytes"] else None


def _finish(write: Callable, folder: Path, name: str, job: Any, plan: str) -> dict[str, Any]:
    entry, rejected = write(folder / name, job)
    record = {"plan": plan, "entry": entry, "rejected": rejected}
    write_json(folder / RECORDS / f"{name}.json", record)
    return record


def _end_with_parent() -> None:
    # The workers of a pool would outlive a killed parent and wait for work for ever.
    def wait() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
