"""The program as a user runs it: a process of its own, on a tiny real model, through real Ray."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_ray.results.store import Store

HEAD = """
name: tiny
precision: float32
teacher: {path: ./model}
data:
  source: {kind: files, path: "text/**/*.txt"}
  sequence_length: 32
  calibration: 8
  validation: 8
"""
"""Model and text of an experiment without anything to do."""

EXPERIMENT = (
    HEAD
    + """\
budget: {parameters: 75k, tolerance: 10%}
search:
  space: {layers: 3..4, mlp: 48..96 by 16, heads: [3, 6]}
  trials: 7
  halving: null
  retrain: {tokens: 2048, rungs: 3, batch: 4, learning_rate: 3e-3}
distill: {tokens: 32k, learning_rate: 3e-3}
"""
)


@dataclass(kw_only=True)
class Desk:
    """A folder with a teacher, a text, an experiment file and a results folder."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @classmethod
    def lay(cls, folder: Path, model: Path, text: Path) -> Desk:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(model, folder / "model")
        shutil.copytree(text, folder / "text")
        (folder / "tiny.yaml").write_text(EXPERIMENT)
        return cls(folder=folder)

    def clear(self) -> None:
        """Ends what is still running."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.communicate()

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "minitron_ray", *arguments],
            cwd=self.folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def call(self, *arguments: str, expect: int = 0, **environment: str) -> tuple[str, str]:
        """stdout and stderr of a command that must end with this exit code."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=500)
        assert process.returncode == expect, f"exit code {process.returncode}\n{err}\n{out}"
        return out, err

    def run(self, *arguments: str, **environment: str) -> tuple[str, str]:
        return self.call("run", "tiny.yaml", *arguments, **environment)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Of the first run."""
        folder = self.run_folder()
        return Store(folder, "tiny", folder.name).read(table).to_pylist()

    def run_folder(self) -> Path:
        """The first run's."""
        return min(path.parent for path in self.results.glob("tiny/*/run.json"))

    def stop_when(
        self,
        seen: Callable[[], bool],
        number: signal.Signals,
        *arguments: str,
        files: tuple[str, ...] = ("tiny.yaml",),
        patience: float = 300,
    ) -> tuple[int, str]:
        """Starts a run, sends the signal to the driver alone once `seen`, and waits for its end."""
        process = self.start("run", *files, *arguments)
        deadline = time.monotonic() + patience
        while not seen():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "what the test waits for never came"
            time.sleep(0.02)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=300)
        return process.returncode, err
