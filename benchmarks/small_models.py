"""What benchmarks need and no hub gives: a small Llama with its tokenizer, untrained or trained on English."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from minitron_ray.data.batches import batch_indices
from minitron_ray.data.source import TextSource
from minitron_ray.data.sources.pypi import Pypi
from minitron_ray.data.tokens import TokenStore
from minitron_ray.distillation.loop import Data, Recipe, Share, Step, make_optimizer, train
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.results.cache import Cache
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import initialized

TEXT: Final = "pypi://django==5.2.19/docs/**/*.txt"
"""English prose of 650 files, 7 MB."""
END: Final = "<|endoftext|>"


def text_source(path: str = TEXT) -> Pypi:
    return Pypi(path=path)


def write_tokenizer(folder: Path, cache: Cache, source: TextSource, vocabulary: int) -> None:
    """A byte-level BPE tokenizer trained on the text, end-of-text token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = (document.text for document in source.documents(Path(), cache))
    tokenizer.train_from_iterator(documents, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)


def llama(*, layers: int, hidden: int, heads: int, mlp: int, vocabulary: int, length: int) -> dict[str, Any]:
    """Its `config.json`: half as many KV groups as heads, tied embeddings."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """With random weights."""
    initialized(config, seed=0).save_pretrained(folder)


def write_trained(
    folder: Path, config: dict[str, Any], store: TokenStore, sequences: range, *, tokens: int, rate: float
) -> Iterator[Step]:
    """Trains by cross entropy alone on `sequences` of the store, step by step, then writes it."""
    model, batch, length = initialized(config, seed=0), 8, store.sequence_length
    recipe = Recipe(
        loss=CrossEntropy(),
        schedule=Schedule(peak=rate, minimum=rate / 10, warmup=0.05, tokens=tokens),
        batch=batch,
        sequence_length=length,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
    )
    data = Data(
        batch=lambda step: batch_indices(sequences, step - 1, batch, 0),
        sequences=store.sequences,
    )
    share = Share(device=torch.device("cpu"), dtype=torch.float32, micro_batch=batch)
    student = Headless(model)
    yield from train(student, make_optimizer(student, recipe), None, data, recipe, share)
    model.save_pretrained(folder)
