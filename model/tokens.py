"""From text to token ids.

Bytes are the default: no vocabulary file that peers could differ in, and every text has tokens. A
checkpoint folder that brings its own tokenizer is trained with that one.

Guaranteed: one tokenizer maps one text to one sequence, below its vocabulary. Not guaranteed: that
two versions of the `tokenizers` library agree; the data's digest shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from model.builders import ModelConfig, ModelError, local_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Tokenizer(Protocol):
    """Turns text into ids and back."""

    vocabulary: int

    def encode(self, text: bytes) -> npt.NDArray[np.generic]:
        """One document as (T,) unsigned ids, its end marked.

        Args:
            text: UTF-8, or what an old file holds; only a tokenizer of `transformers` decodes it.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of these ids; what is not UTF-8 shows as the replacement character."""


class ByteTokenizer:
    """The text's own bytes; a zero byte, which no text holds, ends a document."""

    vocabulary = 256

    def encode(self, text: bytes) -> npt.NDArray[np.generic]:
        """One document as (T,) uint8, a zero at its end."""
        return np.frombuffer(text + b"\0", dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of these bytes."""
        return bytes(ids).decode("utf-8", errors="replace")


class CheckpointTokenizer:
    """The tokenizer that lies in a checkpoint folder."""

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        self._inner = inner
        self.vocabulary = len(inner)

    def encode(self, text: bytes) -> npt.NDArray[np.generic]:
        """One document as (T,) uint32, the end-of-text token at its end where there is one."""
        # verbose: it would warn that a document is longer than the model's context.
        ids = self._inner.encode(
            text.decode("utf-8", errors="replace"), add_special_tokens=False, verbose=False
        )
        end = self._inner.eos_token_id
        return np.asarray([*ids, end] if isinstance(end, int) else ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of these ids."""
        return str(self._inner.decode(list(ids)))


def tokenizer_for(config: ModelConfig) -> Tokenizer:
    """The tokenizer that belongs to a model: the checkpoint folder's own, otherwise bytes.

    Raises:
        ModelError: the folder has a tokenizer, but it cannot be read.
    """
    folder = local_checkpoint(config)
    if folder is None or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return ByteTokenizer()
    from transformers import AutoTokenizer

    try:
        return CheckpointTokenizer(
            AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"the tokenizer in {folder} cannot be read: {reason}") from error
