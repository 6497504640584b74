"""What the compared models are run on: text given, tokens or pixels drawn at random.

Made from the model's class and config alone, the same in every run.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from psoft_export.errors import UsageError
from psoft_export.model.skeleton import Skeleton
from psoft_export.plan import MergePlan
from psoft_export.verification.text import read_text

_SEED = 20260101
_ROWS = 4  # sequences of each length
_LENGTHS = (1, 7, 32, 128)
_DECODER_LENGTH = 16
_PROMPTS = 4
_PROMPT_LENGTH = 16
_NEW_TOKENS = 32
_WINDOWS = 8  # of the text, for the task loss
_IMAGES = 16
_IMAGE_SIZE = 224  # where the config does not say
SPARE_POSITIONS = 2  # RoBERTa's first two are never a token's
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


class CannotRunError(Exception):
    """A model that this level does not run; the message is a plain sentence."""


@dataclass(frozen=True)
class Batch:
    """Arguments of one call of a model.

    Attributes:
        arguments: by name; floating ones are for the caller to cast to the model's dtype.
        valid: rows × length, true where a position is not padding; None where all are.
        positions: number of positions that are not padding.
        split: where to give the sequences in two parts, the second with the first one's cache;
            None: whole.
    """

    arguments: Mapping[str, Tensor]
    valid: Tensor | None
    positions: int
    split: int | None = None


@dataclass(frozen=True)
class Inputs:
    """Everything that each model is run on.

    Attributes:
        batches: for outputs.
        prompts: prompts × length, for greedy generation; None where the model does not generate.
        new_tokens: how many tokens to generate after each prompt.
        windows: windows × length of the text, for the task loss; None without text, or where the
            model is not a causal language model.
        words: the batches in words.
    """

    batches: tuple[Batch, ...]
    prompts: Tensor | None
    new_tokens: int
    windows: Tensor | None
    words: str


def make_inputs(
    skeleton: Skeleton, folder: Path, text: Path | None, *, of_graph: bool = False
) -> Inputs:
    """The inputs for a model.

    Args:
        skeleton: its class and config.
        folder: where the tokenizer is.
        text: a UTF-8 file, of which the first MiB is read, or None.
        of_graph: also what a graph could have fixed without telling: other batch sizes, and for a
            causal language model sequences in two parts.

    Raises:
        UsageError: the text cannot be read or is too short, or the model cannot read text.
        CannotRunError: the model takes neither tokens nor pixels.
    """
    generator = torch.Generator().manual_seed(_SEED)
    kind = skeleton.model_class.main_input_name
    if kind == "pixel_values":
        if text is not None:
            raise UsageError(f"{text}: {skeleton.class_name} takes images, not text")
        return _image_inputs(skeleton.config, generator, of_graph)
    if kind != "input_ids":
        raise CannotRunError(f"{skeleton.class_name} takes '{kind}', neither tokens nor images")
    return _TokenInputs(skeleton, folder, text, generator, of_graph).made()


def tokenizer_folder(plan: MergePlan) -> Path:
    """The folder whose tokenizer belongs to the merge: the adapter's if it brings one.

    Never the merged one's: what is checked does not choose what it is checked on.
    """
    adapter = plan.adapter.source.folder
    return adapter if _has_vocabulary(adapter) else plan.base.folder


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def pad_token(config: Any) -> int:
    """The token that pads: the config's, or 0 where it names none."""
    found = getattr(config.get_text_config(), "pad_token_id", None)
    return 0 if found is None else int(found)


def decoder_start_token(config: Any) -> int:
    """The token that a decoder starts with: the config's, or else the one that pads."""
    found = getattr(config, "decoder_start_token_id", None)
    return pad_token(config) if found is None else int(found)


def _image_inputs(config: Any, generator: torch.Generator, of_graph: bool) -> Inputs:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or _IMAGE_SIZE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", None) or 3
    pixels = torch.randn(_IMAGES, channels, height, width, generator=generator)
    words = f"{_IMAGES} images of {height} × {width} random pixels"
    parts = [pixels[:1], pixels[1:]] if of_graph else [pixels]
    batches = tuple(Batch({"pixel_values": part}, None, len(part)) for part in parts)
    return Inputs(batches, None, 0, None, words)


class _TokenInputs:
    """Makes the inputs of one model that reads tokens."""

    def __init__(
        self,
        skeleton: Skeleton,
        folder: Path,
        text: Path | None,
        generator: torch.Generator,
        of_graph: bool,
    ) -> None:
        self._of_graph = of_graph
        self._config = skeleton.config
        self._generates = skeleton.model_class.can_generate()
        self._is_seq2seq = bool(getattr(self._config, "is_encoder_decoder", False))
        self._parameters = inspect.signature(skeleton.model_class.forward).parameters
        self._generator = generator
        self._pad = pad_token(self._config)
        longest = max(_LENGTHS)
        if positions := getattr(self._config.get_text_config(), "max_position_embeddings", None):
            longest = max(1, min(longest, positions - SPARE_POSITIONS))
        self._lengths = sorted({min(length, longest) for length in _LENGTHS})
        vocabulary = int(self._config.get_text_config().vocab_size)
        tokenizer = _tokenizer(folder)
        self._text: Tensor | None = None
        if text is not None:
            self._text = _tokens_of(text, tokenizer, vocabulary, longest, folder)
            self._kind = "text"
            return
        allowed = set(range(vocabulary))
        self._kind = "random tokens"
        if tokenizer is not None:
            own = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
            allowed &= own
            self._kind = "random tokens of the tokenizer"
        self._allowed = torch.tensor(sorted(allowed - {self._pad}))
        if not len(self._allowed):
            raise CannotRunError("the tokenizer has no token that the model knows")

    def made(self) -> Inputs:
        longest = self._lengths[-1]
        whole = [self._drawn(_ROWS, length) for length in self._lengths]
        batches = [self._batch(ids, None) for ids in whole]
        padded = [ids[i] for ids in whole for i in range(_ROWS // len(whole))]
        batches.append(self._padded(padded))
        if self._of_graph:
            batches += self._of_other_sizes(whole[-1], padded)
        prompts = windows = None
        new_tokens = 0
        if self._generates and longest > 1:
            prompt = min(_PROMPT_LENGTH, longest // 2)
            new_tokens = min(_NEW_TOKENS, longest - prompt)
            prompts = self._drawn(_PROMPTS, prompt)
            if self._text is not None and not self._is_seq2seq:
                windows = self._drawn(min(_WINDOWS, len(self._text) // longest), longest)
        return Inputs(tuple(batches), prompts, new_tokens, windows, self._words())

    def _of_other_sizes(self, longest: Tensor, padded: list[Tensor]) -> list[Batch]:
        """Batches of one and of three rows; of a causal language model in two parts."""
        batches = [self._batch(longest[:1], None), self._padded(padded[1:])]
        if not self._generates or self._is_seq2seq or longest.shape[1] < 4:
            return batches
        # With a mask: what is given in two parts needs one that spans both.
        one = self._padded([longest[0]])
        return [
            replace(batch, split=split)
            for batch, split in ((one, 1), (batches[1], longest.shape[1] // 2), (one, -1))
        ]

    def _words(self) -> str:
        *first, last = map(str, self._lengths)
        lengths = f"{', '.join(first)} and {last}" if first else last
        return (
            f"{self._kind}: {_ROWS} sequences each of {lengths} tokens without padding, and one "
            f"batch of these lengths padded on the {'left' if self._pads_left else 'right'}"
            + ("; batches of one and three rows" if self._of_graph else "")
            + (", in two parts with the cache" if self._of_graph and self._pads_left else "")
        )

    @property
    def _pads_left(self) -> bool:
        """Whether padding goes where batched generation has it."""
        return self._generates and not self._is_seq2seq

    def _drawn(self, rows: int, length: int) -> Tensor:
        """Rows × length tokens: windows spread evenly over the text, or random ones."""
        if self._text is None:
            picks = torch.randint(len(self._allowed), (rows, length), generator=self._generator)
            return self._allowed[picks]
        starts = torch.linspace(0, len(self._text) - length, rows).long()
        return self._text[starts[:, None] + torch.arange(length)]

    def _padded(self, rows: Sequence[Tensor]) -> Batch:
        """Rows of several lengths in one batch."""
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self._pad)
        valid = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), None) if self._pads_left else slice(0, len(row))
            ids[index, place] = row
            valid[index, place] = True
        return self._batch(ids, valid)

    def _batch(self, ids: Tensor, valid: Tensor | None) -> Batch:
        arguments = {"input_ids": ids}
        if valid is not None:
            arguments["attention_mask"] = valid.long()
            if self._pads_left and "position_ids" in self._parameters:
                # As in generation: a sequence counts from 0 wherever its padding ends.
                arguments["position_ids"] = (valid.long().cumsum(1) - 1).clamp(min=0)
        if self._is_seq2seq:
            length = min(_DECODER_LENGTH, self._lengths[-1])
            decoder = self._drawn(len(ids), length)
            decoder[:, 0] = decoder_start_token(self._config)
            arguments["decoder_input_ids"] = decoder
            return Batch(arguments, None, decoder.numel())
        return Batch(arguments, valid, ids.numel() if valid is None else int(valid.sum()))


def tokens_of_text(folder: Path, path: Path, vocabulary: int, needed: int) -> Tensor:
    """The tokens of a text file, by a checkpoint's own tokenizer.

    Args:
        folder: of the checkpoint.
        path: of the text, UTF-8.
        vocabulary: of the model.
        needed: how many there must be.

    Raises:
        UsageError: the folder has no tokenizer that fits, or the text is too short or unreadable.
    """
    return _tokens_of(path, _tokenizer(folder), vocabulary, needed, folder)


def needed_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint's folder.

    Raises:
        UsageError: it has none that transformers can read.
    """
    if (found := _tokenizer(folder)) is None:
        raise UsageError(f"{folder}: has no tokenizer that transformers can read")
    return found


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder, or None where it has none that can be read."""
    # Without a vocabulary transformers would make an empty tokenizer of the model type's class.
    if not _has_vocabulary(folder):
        return None
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # tokenizer classes raise errors of many kinds; random tokens will do
        return None
    return found


def _tokens_of(
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    needed: int,
    folder: Path,
) -> Tensor:
    """The tokens of a text file."""
    if tokenizer is None:
        raise UsageError(
            f"{folder}: has no tokenizer that transformers can read, so '{path}' cannot be used; "
            "without a text random tokens are run"
        )
    text = read_text(path)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
    if len(tokens) < needed:
        raise UsageError(f"{path}: has {len(tokens)} tokens; at least {needed} are needed")
    if (largest := int(tokens.max())) >= vocabulary:
        raise UsageError(
            f"{folder}: its tokenizer gives token {largest}, but the model has {vocabulary}"
        )
    return tokens
