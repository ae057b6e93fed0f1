"""What keeps a network's numbers where it scales by its own hidden size.

Gemma multiplies embeddings by sqrt(hidden): a student with fewer channels would see its kept ones
shrunk. Its embedding is scaled up by as much; where the LM head is the embedding, so that logits
would grow, the final norm takes the factor back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minitron_ray.models.architecture import Architecture

if TYPE_CHECKING:
    import torch


def embedding_at_teachers_scale(
    weight: torch.Tensor, teacher: Architecture, student: Architecture
) -> torch.Tensor:
    """The cut embedding (vocabulary, hidden) times sqrt(teacher's hidden / student's), in its own type."""
    if teacher.hidden == student.hidden:
        return weight
    return (weight.double() * math.sqrt(teacher.hidden / student.hidden)).to(weight.dtype)


def final_norm_at_teachers_scale(
    weight: torch.Tensor, teacher: Architecture, student: Architecture
) -> torch.Tensor:
    """The cut gain (hidden,) of the final norm, which multiplies by 1 + weight, in its own type; as it
    is where the LM head has weights of its own."""
    if teacher.hidden == student.hidden or not student.tied:
        return weight
    return ((1 + weight.double()) * math.sqrt(student.hidden / teacher.hidden) - 1).to(weight.dtype)
