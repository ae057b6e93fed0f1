"""`copy_companions`: what a student's folder takes over from its teacher's besides weights and config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

_NAMES: Final = (
    "tokenizer",
    "special_tokens",
    "generation_config",
    "vocab",
    "merges",
    "chat_template",
    "added_tokens",
)


def copy_companions(teacher: Path, target: Path) -> None:
    """Copies tokenizer, chat template and generation settings: everything of the teacher's folder that
    is neither weights, nor config, nor code. `target` must have its `config.json`."""
    for path in sorted(teacher.iterdir()):
        if path.is_file() and path.name.startswith(_NAMES) and path.suffix != ".py":
            shutil.copyfile(path, target / path.name)
    source = teacher / "source.json"  # a converted teacher says here which token ends a document
    if source.exists() and "document_separator" in (said := json.loads(source.read_text())):
        told = {"document_separator": said["document_separator"]}
        (target / "source.json").write_text(json.dumps(told))
    if not (target / "generation_config.json").exists():
        config = json.loads((target / "config.json").read_text())
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        (target / "generation_config.json").write_text(json.dumps(ids, indent=2))
