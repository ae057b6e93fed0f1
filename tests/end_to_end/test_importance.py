"""The stage `importance` on real Ray: workers and streaming leave no trace in the table, rounds one in its name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest

from minitron_ray.core.events import EventBus
from minitron_ray.data.splits import Splits
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings, Resources
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment
from minitron_ray.search.rounds import round_shapes
from minitron_ray.search.shape import shape_of
from minitron_ray.stages.rounds import score_rounds
from minitron_ray.stages.scoring import Scorer, Work
from minitron_ray.stages.setting import Setting
from tests.settings import setting_of

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def setting(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("setting")
    experiment = Experiment.model_validate(
        {
            "name": "x",
            "teacher": {"path": str(tiny_llama)},
            "data": {
                "source": {"kind": "files", "path": f"{tiny_text}/**/*.txt"},
                "sequence_length": 32,
            },
            "importance": {
                "width": {"kind": "activation", "gather": "all"},
                "depth": {"kind": "block_importance", "blocks": [2]},
            },
            "shape": {"hidden": 36, "heads": 3, "mlp": 48},
        }
    )
    splits = Splits(calibration=range(10), validation=range(10, 12), train=range(12, 14))
    return setting_of(experiment, tiny_llama, folder, splits)


@dataclass
class Tables:
    """What the stage's passes find with so many workers."""

    setting: Setting
    folder: Path

    def of(self, workers: int, mode: str) -> tuple[pa.Table, pa.Table]:
        """By activation with blocks of layers, and by activation in three rounds."""
        settings = ClusterSettings.model_validate(
            {"workers": workers, "worker": Resources(cpus=1), "importance": mode}
        )
        with Cluster(settings, self.folder / f"{workers}-{mode}", EventBus(), StopSignal()) as cluster:
            work = Work(
                setting=self.setting,
                mode=settings.importance,
                workers=cluster.mappers(),
                together=cluster.together(),
                folder=self.folder / "scratch",
            )
            scorer = Scorer(cluster=cluster, work=work, base=self.folder)
            section = self.setting.experiment.importance
            units, layers = scorer.units(section.width, section.depth)
            assert len(units) == 9 and set(layers) == {1, 2}
            joined = [scores.with_layers(layers).table(label, "depth") for label, scores in units.items()]
            family, teacher = self.setting.family, self.setting.architecture
            sizes = self.setting.experiment.shape
            assert sizes is not None
            shapes = round_shapes(family, teacher, [shape_of(teacher, sizes.sizes)], 3)
            assert [(s.hidden, s.heads, s.mlp) for s in shapes] == [(48, 6, 80), (42, 6, 64)]
            first = units[section.width.label]
            rounds = score_rounds(scorer, section.width, first, shapes)
            assert not list((self.folder / "scratch").iterdir())
            tokens = 10 * 32  # each of them goes over the calibration sequences
            assert scorer.seen == [tokens] * 3, "the rounds are counted, too"
            for axis, values in rounds.axes().items():
                assert (values >= 2).sum(-1).min() == {"hidden": 42, "heads": 6, "kv_heads": 3, "mlp": 64}[
                    axis
                ]
            return pa.concat_tables(joined), rounds.with_layers(layers).table("rounds", "depth")


def test_one_worker_two_workers_and_a_streamed_teacher_give_one_table(
    setting: Setting, tmp_path: Path
) -> None:
    tables = Tables(setting, tmp_path)
    one, two = tables.of(1, "resident"), tables.of(2, "streamed")
    assert one[0].equals(two[0]) and one[1].equals(two[1])
    assert len(one[0]) > 9 * 400


def test_little_memory_streams(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(setting=setting, mode="auto", workers=2, together=2, folder=tmp_path)
    size = setting.family.parameters(setting.architecture) * setting.share().dtype.itemsize
    for free, resident in ((size * 4, True), (size * 3, False)):  # 2 workers, 60 %
        monkeypatch.setattr("minitron_ray.stages.scoring.free_memory", lambda device, free=free: free)
        assert work.resident() is resident
    assert replace(work, mode="resident").resident() and not replace(work, mode="streamed").resident()
    streams = 10 * 32 * 48 * setting.share().dtype.itemsize
    for free, folder in ((streams * 9, None), (streams * 7, tmp_path)):
        monkeypatch.setattr("minitron_ray.stages.scoring.free_memory", lambda device, free=free: free)
        assert work.streams_folder(10, 1) == folder
