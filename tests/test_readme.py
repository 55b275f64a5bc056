"""The README says what the records and the code say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pairtrace.engine.architectures import FAMILIES
from pairtrace.engine.formats import FORMATS
from pairtrace.engine.vllm.families import VLLM_FAMILIES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_come_from_the_records() -> None:
    command = [sys.executable, "benchmarks/readme_tables.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_all_families_and_formats_are_listed() -> None:
    listed = re.search(r"own unpacked forward pass: (.*?)\.\s", README, re.S)
    assert listed
    names = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in listed[1].split(",")}
    assert names == {re.sub(r"[^a-z0-9]", "", name) for name in FAMILIES}
    assert all(f"`{name}`" in README for name in FORMATS)
    compared = re.search(r"Compared so far are (.*?);", README, re.S)
    assert compared and re.findall(r"`(\w+)`", compared[1]) == sorted(VLLM_FAMILIES)


def test_the_library_example_is_valid() -> None:
    """Its names exist and its configurations are accepted; the job itself runs in test_cli."""
    import pairtrace

    example = re.search(r"```python\n(.*?)```", README, re.S)
    assert example
    calls: list[str] = []

    def stub(name: str) -> Callable[..., list[object]]:
        def record(*arguments: object, **keywords: object) -> list[object]:
            calls.append(name)
            return []

        return record

    stubs = {name: stub(name) for name in ("extract", "build_behavior", "score", "top")}
    imports, _, rest = example[1].partition("\n\n")
    namespace: dict[str, object] = {}
    exec(imports, namespace)
    assert all(namespace[name] is getattr(pairtrace, name) for name in stubs)
    exec(rest, {**namespace, **stubs})
    assert calls == ["extract", "build_behavior", "score", "top"]


def test_commands_of_the_readme_exist() -> None:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    for path in re.findall(r"(?:benchmarks|examples|constraints)/[\w./-]+", blocks):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", blocks, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
