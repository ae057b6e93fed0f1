"""What every test may use: a tiny real checkpoint, a tiny real text, and a closed environment.

The variables below must be set before torch, ray or huggingface_hub are imported, hence at the top.
"""

from __future__ import annotations

import os
import random
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PRIVATE = tempfile.TemporaryDirectory(prefix="minitron-ray-tests-", ignore_cleanup_errors=True)
_AUTH_TOKEN = Path(_PRIVATE.name, "ray_auth_token")
_AUTH_TOKEN.write_text(secrets.token_hex(32), encoding="ascii")
_AUTH_TOKEN.chmod(0o600)

os.environ.update(
    OMP_NUM_THREADS="1",  # tests run side by side with Ray workers on few cores
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",  # its threads do not survive a fork
    HF_HOME=str(Path(_PRIVATE.name, "huggingface")),  # neither read nor fill the user's cache
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_VERBOSITY="error",
    RAY_AUTH_MODE="token",  # Ray reads it when it is imported, and then needs the token to exist
    RAY_AUTH_TOKEN_PATH=str(_AUTH_TOKEN),  # not the user's
    RAY_memory_monitor_refresh_ms="0",  # it counts the whole machine's memory and kills workers
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.3",
)
for _name in ("MINITRON_RAY_RESULTS", "RAY_ADDRESS", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

EOS = "<|endoftext|>"


def pytest_unconfigure() -> None:
    _PRIVATE.cleanup()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that needs a GPU says so where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six `.txt` files in two subfolders, 60 kB of English-like text. Do not write to it."""
    folder = tmp_path_factory.mktemp("tiny_text")
    source = random.Random(0)
    for index, name in enumerate(("intro", "guide/install", "guide/use", "guide/tune", "notes/a", "notes/b")):
        path = folder / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(_prose(source, title=f"Chapter {index}", characters=10_000), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama checkpoint with its tokenizer, as found on a hub. Do not write to it.

    4 layers, hidden 48, 6 heads of 8 in 3 KV groups, MLP 96, vocabulary 256, tied embeddings,
    float32: 95,664 parameters. Its weights are five times as wide as usual, so that what a cut
    removes shows in the logits.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama") / "model"
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        intermediate_size=96,
        vocab_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        # Norms start as ones in every Llama; distinct values let a test see a wrongly cut one.
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def _tokenizer():  # type: ignore[no-untyped-def]
    """A byte-level BPE tokenizer of exactly 256 tokens that encodes every text without loss.

    Thirteen byte values never occur in UTF-8 (C0, C1, F5 to FF); leaving them out makes room for
    the end-of-text token, id 0, and twelve merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256, special_tokens=[EOS], initial_alphabet=_utf8_alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([_prose(random.Random(1), title="Training", characters=20_000)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, model_max_length=512
    )


def _utf8_alphabet() -> list[str]:
    """The characters by which a byte-level tokenizer writes the 243 byte values of UTF-8."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(0x100) if value not in printable]
    written = {value: chr(value) for value in printable}
    written |= {value: chr(0x100 + place) for place, value in enumerate(others)}
    return [written[value] for value in range(0x100) if value not in (0xC0, 0xC1, *range(0xF5, 0x100))]


_SUBJECTS = (
    "the model, a student, the teacher, every layer, one worker, the cluster, a reader, this run".split(", ")
)
_VERBS = "keeps, learns, drops, measures, repeats, explains, follows, forgets, compares, returns".split(", ")
_OBJECTS = "a head, the loss, its neighbour, the next token, most neurons, a short text, no answer".split(
    ", "
)
_TAILS = (
    "in the morning, after a while, without a word, because it is cheaper, as the paper says, "
    "when the budget is small, and then starts again, for 15 epochs, at a rate of 0.5"
).split(", ")


def _prose(source: random.Random, *, title: str, characters: int) -> str:
    """Sentences put together at random, in paragraphs under a heading; ASCII."""

    def sentence() -> str:
        words = (source.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _TAILS))
        return " ".join(words).capitalize() + "."

    def paragraphs() -> Iterator[str]:
        yield f"{title}\n{'=' * len(title)}"
        length = 0
        while length < characters:
            paragraph = " ".join(sentence() for _ in range(source.randint(2, 6)))
            length += len(paragraph) + 2
            yield paragraph

    return "\n\n".join(paragraphs())[: characters - 1] + "\n"
