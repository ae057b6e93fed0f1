"""`sequence_scores` against float64, and against the two passes of exponentials that it does without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minitron_ray.weights import vocabulary
from minitron_ray.weights.vocabulary import sequence_scores

VOCABULARY = 50_257
SAMPLES, TOKENS = 2, 66
"""65 predictions are two chunks where a chunk has 64; the last block of 3,000 words is smaller."""


def models(width: float) -> dict[str, Tensor]:
    """A teacher, and a student near it; the larger `width`, the more peaked are the two."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(SAMPLES, TOKENS, 24, generator=draw)
    head = width * torch.randn(VOCABULARY, 24, generator=draw)
    return {
        "hidden": hidden + 0.05 * torch.randn(hidden.shape, generator=draw),
        # Shifted as a whole, which changes no probability.
        "head": torch.cat([head[:, :-1], head[:, -1:] + 3.0], 1),
        "input_ids": torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=draw),
        "teacher_hidden": hidden,
        "teacher_head": head,
    }


def logits(m: dict[str, Tensor], whose: str, dtype: torch.dtype) -> Tensor:
    """Of one sequence after another, as everything that is compared here takes them: products in `dtype`."""
    states, head = m[f"{whose}hidden"][:, :-1].to(dtype), m[f"{whose}head"].to(dtype)
    return torch.stack([(own @ head.T).float() for own in states])


def expected(m: dict[str, Tensor], dtype: torch.dtype, within: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each prediction's cross entropy and divergence, with all behind the products `within` a type."""
    student, teacher = (logits(m, whose, dtype).to(within).log_softmax(-1) for whose in ("", "teacher_"))
    losses = -student.gather(-1, m["input_ids"][:, 1:, None])[..., 0]
    return losses.double(), (teacher.exp() * (teacher - student)).sum(-1).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [0.1, 8.0])
def test_scores_are_as_exact_as_log_softmax(
    dtype: torch.dtype, width: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From nearly uniform to nearly certain."""
    monkeypatch.setitem(vocabulary._SCORED, "cpu", (64, 3000))
    m = models(width)
    found = sequence_scores(**m, dtype=dtype)
    exact, usual = (expected(m, dtype, within) for within in (torch.float64, torch.float32))
    for ours, truth, theirs in zip(found, exact, usual, strict=True):
        assert ours is not None and ours.dtype == torch.float64
        size = truth.abs().mean(-1)
        error, of_others = (ours - truth.mean(-1)).abs(), (theirs.mean(-1) - truth.mean(-1)).abs()
        # A unit in the last place of a float32 beside what the logarithms of the softmax lose.
        assert (error <= of_others + 1.2e-7 * (1 + size)).all(), (error, of_others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_models_do_not_diverge_at_all(dtype: torch.dtype) -> None:
    m = models(2.0)
    m["hidden"], m["head"] = m["teacher_hidden"], m["teacher_head"]
    _, divergences = sequence_scores(**m, dtype=dtype)
    assert divergences is not None and not divergences.any()


def test_a_sequence_does_not_see_those_beside_it() -> None:
    m = models(1.0)
    both = sequence_scores(**m)
    for sample in range(SAMPLES):
        alone = sequence_scores(
            **{name: value if "head" in name else value[sample : sample + 1] for name, value in m.items()}
        )
        for whole, one in zip(both, alone, strict=True):
            assert whole is not None and one is not None and whole[sample] == one[0]


def test_only_what_counts_is_in_the_means() -> None:
    """What does not count may be anything, also not finite."""
    m, counted = (
        models(1.0),
        torch.rand(SAMPLES, TOKENS - 1, generator=torch.Generator().manual_seed(1)) < 0.5,
    )
    exact = expected(m, torch.float32, torch.float64)
    m["hidden"][:, :-1][~counted] = torch.nan
    for found, truth in zip(sequence_scores(**m, counted=counted), exact, strict=True):
        assert found is not None
        means = torch.stack([row[chosen].mean() for row, chosen in zip(truth, counted, strict=True)])
        torch.testing.assert_close(found, means, rtol=1e-6, atol=1e-6)


def test_soft_caps_are_of_the_logits() -> None:
    m = models(1.0)
    student, teacher = (
        (cap * (logits(m, whose, torch.float32).double() / cap).tanh()).log_softmax(-1)
        for whose, cap in (("", 3.0), ("teacher_", 5.0))
    )
    losses, divergences = sequence_scores(**m, softcap=3.0, teacher_softcap=5.0)
    assert divergences is not None
    labels = m["input_ids"][:, 1:, None]
    torch.testing.assert_close(losses, -student.gather(-1, labels).mean((1, 2)), rtol=1e-6, atol=0)
    truth = (teacher.exp() * (teacher - student)).sum(-1).mean(-1)
    torch.testing.assert_close(divergences, truth, rtol=1e-5, atol=0)
