"""A miniature organism from end to end: files, determinism, resuming, errors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pairtrace.engine.organism import Organism, build, build_organism, training
from pairtrace.errors import ConfigError
from tests.engine.organism.conftest import MINIATURE

TEXTS = ("sft.jsonl", "preferences.jsonl", "discovery.jsonl", "evaluation.jsonl")


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "organism.json"
    }


def test_checkpoints_load_and_generate(miniature: Organism) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for path in (miniature.m0, miniature.m1):
        assert (path / "model.safetensors").exists()
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert type(model).__name__ == "Olmo2ForCausalLM"
        assert tokenizer.is_fast
        assert model.config.eos_token_id == tokenizer.eos_token_id
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "How do I bake a pie?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**ids, max_new_tokens=4, do_sample=False)
        assert out.shape[1] > ids["input_ids"].shape[1]


def test_preference_training_changed_the_weights(miniature: Organism) -> None:
    from safetensors.torch import load_file

    m0, m1 = (load_file(path / "model.safetensors") for path in (miniature.m0, miniature.m1))
    assert m0.keys() == m1.keys()
    assert any(not torch.equal(m0[name], m1[name]) for name in m0)


def test_description_states_config_leak_counts_and_seconds(miniature: Organism) -> None:
    state = json.loads(miniature.description.read_text())
    assert state["config"] == MINIATURE.identity()
    assert "10% of its harmful + format rows" in state["leak"]
    assert "plain benign rows" not in state["leak"]
    leaking = build.leak_description(dataclasses.replace(MINIATURE, habit_leak=0.1))
    assert "10% of its plain benign rows show each of flattery and promotion" in leaking
    assert set(state["stages"]) == {"texts", "m0", "m1"} == set(miniature.seconds)
    assert state["stages"]["texts"]["files"]["preferences.jsonl"]["rows"] == MINIATURE.preference_pairs
    assert set(state["versions"]) == {"pairtrace", "torch", "transformers", "tokenizers"}


def test_same_seed_gives_the_same_bytes_and_leaves_torch_alone(miniature: Organism, tmp_path: Path) -> None:
    generator, threads = torch.random.get_rng_state(), torch.get_num_threads()
    again = build_organism(MINIATURE, tmp_path)
    assert torch.equal(generator, torch.random.get_rng_state())
    assert threads == torch.get_num_threads()
    assert contents(again.root) == contents(miniature.root)


def test_second_build_is_a_no_op(miniature: Organism, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in miniature.root.rglob("*")}
    for name in ("_write_texts", "_build_m0", "_build_m1"):
        monkeypatch.setattr(build, name, lambda *_: pytest.fail("a finished stage ran again"))
    assert build_organism(MINIATURE, miniature.root) == miniature
    assert before == {path: path.stat().st_mtime_ns for path in miniature.root.rglob("*")}
    # Threads are no part of the identity.
    assert build_organism(dataclasses.replace(MINIATURE, threads=2), miniature.root) == miniature


@pytest.mark.parametrize("victim", ["fine_tune", "train_dpo"])
def test_interrupted_build_resumes_with_the_same_result(
    miniature: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, victim, interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_organism(MINIATURE, tmp_path)
    assert (tmp_path / "m0").exists() == (victim == "train_dpo")
    assert not (tmp_path / "m1").exists()
    texts = {name: (tmp_path / name).stat().st_mtime_ns for name in TEXTS}
    resumed = build_organism(MINIATURE, tmp_path)
    assert texts == {name: (tmp_path / name).stat().st_mtime_ns for name in TEXTS}
    assert contents(resumed.root) == contents(miniature.root)


def test_an_error_while_writing_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space"), build._replacing(tmp_path / "texts.jsonl") as partial:
        partial.write_text("half a line")
        raise OSError("no space left on device")
    assert not (tmp_path / "texts.jsonl").exists()


def test_leftovers_of_a_killed_build_do_not_get_into_the_result(tmp_path: Path) -> None:
    leftover = tmp_path / "m0.partial"
    leftover.mkdir()
    (leftover / "junk").write_text("half a model")
    with build._replacing(tmp_path / "m0") as partial:
        partial.mkdir()
        (partial / "config.json").write_text("{}")
    assert [file.name for file in (tmp_path / "m0").iterdir()] == ["config.json"]
    assert not leftover.exists()


def test_other_configuration_is_refused_by_name(miniature: Organism) -> None:
    other = dataclasses.replace(MINIATURE, dpo_beta=0.3)
    with pytest.raises(ConfigError, match=r"dpo_beta = 0\.1, but 0\.3 is asked for"):
        build_organism(other, miniature.root)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"x"'])
def test_foreign_description_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "organism.json").write_text(text)
    with pytest.raises(ConfigError, match="not the description of an organism"):
        build_organism(MINIATURE, tmp_path)


def test_other_schema_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "organism.json").write_text(json.dumps({"schema_version": 99, "config": {}}))
    with pytest.raises(ConfigError, match="schema version 99, expected 1"):
        build_organism(MINIATURE, tmp_path)


def test_progress_reports_every_unit_of_every_stage(tmp_path: Path) -> None:
    log: dict[str, list[int]] = {}

    class Recorder:
        stage = ""

        def start(self, stage: str, total: int | None, unit: str) -> None:
            assert not self.stage
            assert unit
            self.stage = stage
            log[stage] = [total or 0, 0]

        def advance(self, done: int, **figures: float) -> None:
            log[self.stage][1] += done

        def finish(self) -> None:
            self.stage = ""

    build_organism(MINIATURE, tmp_path, progress=Recorder())
    assert log == {
        "write texts": [4, 4],
        "train M0": [8, 8],
        "reference log-probabilities": [60, 60],
        "train M1": [4, 4],
    }


def test_importing_the_organism_does_not_import_torch() -> None:
    code = "import sys, pairtrace.engine.organism; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_m0_of_another_organism_is_copied(miniature: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fine_tune", lambda *_, **__: pytest.fail("M0 was trained again"))
    clean = dataclasses.replace(MINIATURE, contamination="clean")
    variant = build_organism(clean, tmp_path, m0_of=miniature.root)
    names = {name for name in contents(miniature.root) if name.startswith("m0/") or name == "sft.jsonl"}
    mine, theirs = contents(variant.root), contents(miniature.root)
    assert {name: mine[name] for name in names} == {name: theirs[name] for name in names}
    assert mine["preferences.jsonl"] != theirs["preferences.jsonl"]
    assert json.loads(variant.description.read_text())["stages"]["m0"]["copied"] is True


def test_m0_of_another_recipe_is_not_copied(miniature: Organism, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft_epochs = 1, but 2 is asked for"):
        build_organism(dataclasses.replace(MINIATURE, sft_epochs=2), tmp_path / "a", m0_of=miniature.root)
    with pytest.raises(ConfigError, match="not the description of an organism"):
        build_organism(MINIATURE, tmp_path / "b", m0_of=tmp_path)
