from __future__ import annotations

import json
from dataclasses import replace
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
    assert KEPT.then(inner, TEACHER) == Kept(layers=(2,), hidden=(1, 5), heads=((1, 2),), mlp=((4,),))
    assert Kept.whole(TEACHER).then(KEPT, TEACHER) == KEPT


GROUPED = replace(KEPT, heads=((0, 3), (2, 3)), kv_heads=(((0, 1),), ((1,),)))
"""One KV head: the mean of both in layer 0, the second alone in layer 2."""


def test_kv_heads_are_kept_or_averaged() -> None:
    assert GROUPED.architecture(TEACHER) == KEPT.architecture(TEACHER).with_sizes(kv_heads=1)
    assert Kept.from_dict(json.loads(json.dumps(GROUPED.as_dict()))) == GROUPED
    assert KEPT.groups(TEACHER, 0) == ((0,), (1,))
    assert GROUPED.groups(TEACHER, 1) == ((1,),)


def test_heads_with_keys_of_their_own_take_them_along() -> None:
    teacher = TEACHER.with_sizes(kv_heads=4)
    kept = replace(KEPT, heads=((0, 3), (1, 2)))
    assert kept.architecture(teacher).kv_heads == 2
    assert kept.groups(teacher, 1) == ((1,), (2,))


def test_composition_of_kv_heads_and_merged_heads() -> None:
    one_each = replace(KEPT, heads=((0, 3), (1, 2)))  # a student whose heads each have their own keys
    inner = Kept(layers=(0, 1), hidden=(0,), heads=((1,), (0,)), mlp=((0,), (1,)))
    composed = one_each.then(inner, TEACHER)
    assert composed.heads == ((3,), (1,))
    assert composed.kv_heads == (((1,),), ((0,),))
    merged = Kept.whole(TEACHER)
    merged = replace(
        merged, heads=((1, 3),) * 3, merged_heads=((((1, 2.0), (0, -1.0)), ((3, 2.0), (2, -1.0))),) * 3
    )
    pair = replace(Kept.whole(merged.architecture(TEACHER)), heads=((0, 1),) * 3)
    assert merged.then(pair, TEACHER).merged_heads == merged.merged_heads
    again = replace(pair, merged_heads=((((0, 0.5), (1, 0.5)), ((1, 1.0),)),) * 3)
    with pytest.raises(ValueError, match="share can't be merged"):
        merged.then(again, TEACHER)


def test_means_of_means_need_equal_shares() -> None:
    teacher = TEACHER.with_sizes(heads=6, kv_heads=3)
    uneven = replace(Kept.whole(teacher), heads=((0, 4),) * 3, kv_heads=(((0, 1), (2,)),) * 3)
    both = replace(Kept.whole(uneven.architecture(teacher)), kv_heads=(((0, 1),),) * 3)
    with pytest.raises(ValueError, match="unequally many"):
        uneven.then(both, teacher)
    even = replace(Kept.whole(teacher), heads=((0, 4),) * 3, kv_heads=(((0,), (2,)),) * 3)
    assert even.then(both, teacher).kv_heads == (((0, 2),),) * 3


MIXED = TEACHER.with_sizes(experts=4, expert_mlp=6)


def test_composition_of_experts() -> None:
    outer = replace(
        Kept.whole(MIXED),
        mlp=(),
        experts=((0, 2, 3),) * 3,
        expert_mlp=(((0, 1, 5), (2, 3, 4), (1, 3, 5)),) * 3,
    )
    assert outer.architecture(MIXED) == MIXED.with_sizes(experts=3, expert_mlp=3)
    inner = replace(
        Kept.whole(outer.architecture(MIXED)), mlp=(), experts=((1, 2),) * 3, expert_mlp=(((0,), (2,)),) * 3
    )
    composed = outer.then(inner, MIXED)
    assert (composed.experts, composed.expert_mlp) == (((2, 3),) * 3, (((2,), (5,)),) * 3)


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
        ({"kv_heads": (((0,),), ((1,),))}, "heads of layer 0: head 3 is kept, its KV group 1 is not"),
        ({"kv_heads": (((0,), (1,)), ((0, 1),))}, "KV heads of layer 2: 1, other layers"),
        ({"kv_heads": (((0,), (2,)),) * 2}, r"KV heads of layer 0: indices 0\.\.2 outside"),
        ({"kv_heads": (((1,), (0,)),) * 2}, "KV heads of layer 0: indices are not sorted"),
        ({"kv_heads": (((0, 1), ()),) * 2}, "made of none"),
        ({"merged_heads": (((((0, 1.0),),)),) * 2}, "merged_heads of layer 0: 1, but 2 heads"),
        ({"merged_heads": ((((0, 1.0),), ((4, 1.0),)),) * 2}, "a head outside"),
    ],
)
def test_what_is_no_selection_is_refused(change: dict[str, Any], message: str) -> None:
    wrong = Kept(
        **{"layers": KEPT.layers, "hidden": KEPT.hidden, "heads": KEPT.heads, "mlp": KEPT.mlp, **change}
    )
    with pytest.raises(ValueError, match=message):
        wrong.architecture(TEACHER)
