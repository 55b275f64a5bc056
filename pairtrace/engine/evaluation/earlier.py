"""A report that is there already: a later run may add to it, but not put other figures in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pairtrace.errors import ConfigError

_SAME = (
    *("prompts_fingerprint", "rollouts", "label_column", "rules", "refusal_rules", "temperature", "max_new_tokens"),
    *("seed", "confidence", "replicates", "dtype", "chat_template", "template_date"),
)
# Settings of what may be absent from the earlier report.
_SAME_WITH = {
    "data": ("data", "format", "split", "max_length", "truncation"),
    "base": ("base", "drift"),
    "lm_eval": ("lm_eval_limit",),
}
_OPTIONS = {"prompts_fingerprint": "PROMPTS", "dtype": "--compute-dtype"}


def require_addition(out: str | None, settings: dict[str, Any]) -> None:
    """Check that the report at `out`, if there is one, keeps its figures.

    Models, held-out pairs, a base, samples, conditions and capability tasks may be added.

    Args:
        out: of the report.
        settings: of this run, as a report has them.

    Raises:
        ConfigError: the report was made with other settings, or the file is no report.
    """
    if out is None or not Path(out).exists():
        return
    try:
        found = json.loads(Path(out).read_text(encoding="utf-8"))["settings"]
        given = json.loads(json.dumps(settings))
        names = [*_SAME, *(name for key, with_it in _SAME_WITH.items() if found[key] for name in with_it)]
        pairs = [(name, found[name], given[name]) for name in names]
        # Reports from before there was a choice say nothing of it.
        pairs.append(("backend", found.get("backend", "hf"), given.get("backend", "hf")))
        fewer = [
            (name, found[name], given[name]) for name in ("models", "lm_eval") if set(found[name]) - set(given[name])
        ]
        if found["conditions"] is not None and set(found["conditions"]) - set(
            given["conditions"] or found["conditions"]
        ):
            fewer.append(("conditions", found["conditions"], given["conditions"]))
        if found["samples"] > given["samples"]:
            fewer.append(("samples", found["samples"], given["samples"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{out} exists and is no report of this version of `pairtrace evaluate`; choose another --out, or remove it"
        ) from None
    for name, earlier, now in [*(pair for pair in pairs if pair[1] != pair[2]), *fewer]:
        option = _OPTIONS.get(name, "MODEL" if name == "models" else "--" + name.replace("_", "-"))
        raise ConfigError(
            f"{out} was made with other settings: {option} was {_shown(earlier)}, now {_shown(now)}; choose another "
            "--out, or remove it (responses that fit are used again)"
        )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "nothing"
    return "not given" if value is None else str(value)
