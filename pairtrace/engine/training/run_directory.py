"""The directory of an unfinished training run, and how it becomes the finished one.

The finished directory holds the checkpoint, the record of the command that made it (`pairtrace_train.json` or
`pairtrace_finetune.json`), and what it cost. While a run is unfinished, everything lies in `OUT.partial`: `run.json`
with what the run is, `checkpoint-N` to resume from, `final` while the result is written. `final` is renamed to `OUT` at
the very end.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from pairtrace.engine.atomic import replacing
from pairtrace.errors import ConfigError
from pairtrace.store.lock import WriterLock

logger = logging.getLogger(__name__)

COSTS = "pairtrace_train.costs.jsonl"
# Names every file of a checkpoint with its size; written last.
_MARKER = "complete.json"
_PREFIX = "checkpoint-"


class RunDirectory:
    """The files of one run.

    Args:
        out: directory that the trained checkpoint will have.
        command: that makes it.

    Attributes:
        out, partial: the finished and the unfinished directory.
    """

    def __init__(self, out: str | Path, command: Literal["train", "finetune"] = "train") -> None:
        self.out = Path(out)
        self._command = command
        self.partial = self.out.with_name(self.out.name + ".partial")

    def finished(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The record of the finished run, where `out` holds one with the same identity.

        Raises:
            ConfigError: `out` holds something else.
        """
        if not self.out.exists():
            return None
        try:
            record = json.loads((self.out / self._record_name).read_text(encoding="utf-8"))
            found = record["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{self.out} exists and was not made by `pairtrace {self._command}`; choose another --out, or remove it"
            ) from None
        _compare(found, identity, f"{self.out} holds the result of another run", "choose another --out, or remove it")
        assert isinstance(record, dict)
        return record

    @property
    def _record_name(self) -> str:
        return f"pairtrace_{self._command}.json"

    def begin(self, identity: dict[str, Any]) -> WriterLock:
        """Make the directory of the run, or take over that of an unfinished run with the same identity.

        A run that left no complete checkpoint has nothing to go on with: any run may take its place. The records of
        its cost stay.

        Returns:
            A lock, to be held until the run ends.

        Raises:
            ConfigError: the unfinished run is another one, or the directory cannot be written.
            StoreLockedError: another process is at it.
        """
        description = self.partial / "run.json"
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            lock = WriterLock(self.partial)
        except OSError as error:
            raise ConfigError(f"cannot write {self.partial}: {error}") from error
        try:
            if description.exists() and any(map(_is_complete, self.partial.glob(_PREFIX + "*"))):
                try:
                    found = json.loads(description.read_text(encoding="utf-8"))
                except ValueError:
                    raise ConfigError(f"{description} is damaged; remove {self.partial} to begin anew") from None
                advice = f"repeat the command with the earlier settings, or remove {self.partial} to begin anew"
                _compare(found, identity, f"{self.partial} holds an unfinished run of another kind", advice)
            else:
                with replacing(description) as temporary:
                    temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        except ConfigError:
            lock.release()
            raise
        return lock

    def last_checkpoint(self) -> Path | None:
        """The complete checkpoint of the latest step; incomplete ones are removed with a message."""
        complete = []
        for path in self.partial.glob(_PREFIX + "*"):
            if _is_complete(path):
                complete.append(path)
            else:
                logger.warning("%s was not written to its end; it is left out and removed", path)
                shutil.rmtree(path)
        return max(complete, key=_step, default=None)

    def seal_checkpoint(self, step: int) -> None:
        """Mark the checkpoint of `step` as complete, and only then remove the earlier ones."""
        path = self.partial / f"{_PREFIX}{step}"
        sizes = {}
        for file in sorted(path.iterdir()):
            _flush(file)
            sizes[file.name] = file.stat().st_size
        with replacing(path / _MARKER) as temporary:
            temporary.write_text(json.dumps(sizes), encoding="utf-8")
        for other in self.partial.glob(_PREFIX + "*"):
            if other != path:
                shutil.rmtree(other)

    def final(self) -> Path:
        """An empty directory to write the result to."""
        path = self.partial / "final"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def publish(self, record: dict[str, Any]) -> None:
        """Add the record of the run and its costs to `final`, give it its place, and remove the unfinished directory.

        Args:
            record: plain JSON values; "identity" is what `finished` compares.
        """
        final = self.partial / "final"
        (final / self._record_name).write_text(json.dumps(record, indent=1), encoding="utf-8")
        (final / COSTS).write_bytes((self.partial / COSTS).read_bytes())
        for file in final.rglob("*"):
            if file.is_file():
                _flush(file)
        final.rename(self.out)
        shutil.rmtree(self.partial)


def _compare(found: dict[str, Any], wanted: dict[str, Any], problem: str, advice: str) -> None:
    differs = [name for name in wanted if found.get(name) != wanted[name]]
    if differs:
        name = differs[0]
        more = f" (and {', '.join(differs[1:])})" if len(differs) > 1 else ""
        raise ConfigError(f"{problem}: its {name} is {found.get(name)!r}, not {wanted[name]!r}{more}; {advice}")


def _is_complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / _MARKER).read_text(encoding="utf-8"))
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _flush(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())
