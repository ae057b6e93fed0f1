from __future__ import annotations

import json
from typing import Any

import pytest

from minitron_ray.models.architecture import Architecture
from minitron_ray.models.kept import Kept

TEACHER = Architecture(
    family="llama", layers=3, hidden=6, heads=4, kv_heads=2, head_dim=2, mlp=5, vocab=7, tied=True
)
KEPT = Kept(layers=(0, 2), hidden=(1, 2, 5), heads=((0, 3), (1, 2)), mlp=((0, 1), (3, 4)))


def test_sizes_of_the_student() -> None:
    assert KEPT.architecture(TEACHER) == TEACHER.with_sizes(layers=2, hidden=3, heads=2, mlp=2)
    assert Kept.whole(TEACHER).architecture(TEACHER) == TEACHER


def test_survives_json() -> None:
    assert Kept.from_dict(json.loads(json.dumps(KEPT.as_dict()))) == KEPT


def test_composition() -> None:
    inner = Kept(layers=(1,), hidden=(0, 2), heads=((0, 1),), mlp=((1,),))
    assert KEPT.then(inner) == Kept(layers=(2,), hidden=(1, 5), heads=((1, 2),), mlp=((4,),))
    assert Kept.whole(TEACHER).then(KEPT) == KEPT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "layers: nothing kept"),
        ({"layers": (2, 0)}, "layers: indices are not sorted"),
        ({"hidden": (1, 1)}, "hidden: indices are not sorted"),
        ({"hidden": (1, 6)}, r"hidden: indices 1\.\.6 outside 0\.\.5"),
        ({"hidden": (-1, 0)}, "outside"),
        ({"mlp": ((0, 1),)}, "mlp of 1 layers kept, but 2 layers"),
        ({"mlp": ((0, 1), (0,))}, "mlp of layer 2: 1 kept"),
        ({"heads": ((0, 1), (1, 2))}, r"heads of layer 0: \[2, 0\] kept in the KV groups"),
    ],
)
def test_what_is_no_selection_is_refused(change: dict[str, Any], message: str) -> None:
    wrong = Kept(
        **{"layers": KEPT.layers, "hidden": KEPT.hidden, "heads": KEPT.heads, "mlp": KEPT.mlp, **change}
    )
    with pytest.raises(ValueError, match=message):
        wrong.architecture(TEACHER)
