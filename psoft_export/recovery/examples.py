"""Data of a task as users have it: text, JSONL, CSV, or folders of images; read into examples.

Each example is what a model takes in one row, and what it should answer there. Every file is read
with the tokenizer or the image processor that base or adapter bring.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoImageProcessor

from psoft_export.checkpoint.reader import file_sha256
from psoft_export.errors import MissingExtraError, UnsupportedError, UsageError, first_line
from psoft_export.model.skeleton import Skeleton, mapped_classes
from psoft_export.verification.inputs import (
    SPARE_POSITIONS,
    decoder_start_token,
    needed_tokenizer,
)
from psoft_export.verification.text import TEXT_BYTES, read_text

Task = Literal["causal", "seq2seq", "masked", "classes", "images"]

WINDOW = 256  # tokens of an example, where the model takes so many
IGNORED = -100  # a target that does not count
FEWEST = 10  # examples: one in five is held out, and two say little
_SHARE_MASKED = 0.15  # of the tokens of a masked model's example (BERT's share)
_HELD_OUT_EVERY = 5
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_TASKS: tuple[tuple[Task, Any], ...] = (
    ("causal", transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    ("seq2seq", transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    ("masked", transformers.MODEL_FOR_MASKED_LM_MAPPING),
    ("classes", transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    ("images", transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
)


@dataclass(frozen=True)
class Example:
    """One row of a batch.

    Attributes:
        inputs: arguments of the model by name: token ids and the like (length), or pixels
            (channels × height × width).
        targets: a token for each position (length), where `IGNORED` does not count; or one class
            (int64) or number (float32), without extent.
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor


@dataclass(frozen=True)
class Examples:
    """The data of a task, in two parts.

    Attributes:
        task: how the model reads it and what it answers.
        train: what signs are searched on.
        held_out: every fifth example, which the search never sees.
        words: the data in words.
    """

    task: Task
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    words: str

    @property
    def digest(self) -> str:
        """SHA-256 of all that the model is given and asked."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.held_out):
            for tensor in (*example.inputs.values(), example.targets):
                digest.update(f"{tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def read_examples(
    path: Path,
    skeleton: Skeleton,
    folder: Path,
    *,
    labels: Sequence[str] | None = None,
    window: int | None = None,
    seed: int = 0,
) -> Examples:
    """The examples in a file, or in a folder of images.

    What a file may hold, by the class of the model:

    - causal: UTF-8 text, cut into windows; JSONL with `text`, `messages` (rendered by the chat
      template), or `prompt` and `completion`, two texts or two lists of messages, where only the
      completion counts, and for texts the token with which the model ends an answer;
    - sequence-to-sequence: JSONL with `prompt` and `completion`; text, of each window of which the
      second half is predicted from the first;
    - masked: text, or JSONL with `text`; 15 % of the tokens are masked;
    - sequence classification: JSONL or CSV with `text`, perhaps `text_pair`, and `label`;
    - image classification: a folder with one folder of images for each label.

    Texts begin, and for all but causal models end, with the tokens that the tokenizer itself adds;
    what a chat template rendered has them already.

    Args:
        path: the file or folder.
        skeleton: the model's class and config.
        folder: of the checkpoint whose tokenizer or image processor reads it.
        labels: names of the classes in the order of the head; default: the config's.
        window: tokens of an example; default: 256, or as many as the model takes.
        seed: of the tokens that are masked.

    Raises:
        UsageError: the file cannot be read, is too short, or its labels do not fit the head; there
            is no tokenizer that fits.
        UnsupportedError: the model's class has no loss that data could tell.
        MissingExtraError: images need a package that is not installed.
    """
    task = _task_of(skeleton)
    if labels is not None and task not in ("classes", "images"):
        raise UsageError(f"labels: {skeleton.class_name} has no classes")
    if task == "images":
        made = _image_examples(path, folder, _Labels(skeleton.config, labels))
        return _in_two(task, made, path, "images")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; {skeleton.class_name} takes a file of text")
    reader = _TextReader(path, skeleton, folder, task, window, seed)
    if task == "classes":
        return _in_two(task, reader.labelled(_Labels(skeleton.config, labels)), path, "texts")
    kind = f"windows of up to {reader.window} tokens"
    return _in_two(task, reader.unlabelled(), path, kind)


def _task_of(skeleton: Skeleton) -> Task:
    for task, mapping in _TASKS:
        if skeleton.model_class in mapped_classes(mapping, skeleton.config):
            return task
    raise UnsupportedError(
        f"{skeleton.class_name}: signs are recovered by a task's loss, and this class has none "
        "that is known here (causal, sequence-to-sequence and masked language models, classifiers "
        "of texts and of images have)"
    )


def _in_two(task: Task, made: Iterable[Example], path: Path, kind: str) -> Examples:
    # What is held out must not be what is searched on, so what repeats counts once.
    different = list({_content(task, e): e for e in made if _has_targets(task, e)}.values())
    if len(different) < FEWEST:
        shorter = "" if task in ("classes", "images") else ", or shorter ones (--window)"
        raise UsageError(
            f"{path}: gives {len(different)} different examples; at least {FEWEST} are needed, for "
            f"one in {_HELD_OUT_EVERY} is held out; give more{shorter}"
        )
    last = _HELD_OUT_EVERY - 1
    return Examples(
        task,
        tuple(e for i, e in enumerate(different) if i % _HELD_OUT_EVERY != last),
        tuple(different[last::_HELD_OUT_EVERY]),
        f"{len(different)} {kind} of {path.name}",
    )


def _has_targets(task: Task, example: Example) -> bool:
    targets = example.targets[1:] if task == "causal" else example.targets
    return not targets.ndim or bool((targets != IGNORED).any())


def _content(task: Task, example: Example) -> tuple[bytes, ...]:
    """What the example is, whatever is asked of it."""
    inputs = dict(example.inputs)
    if task == "masked":
        hidden = example.targets != IGNORED
        inputs["input_ids"] = torch.where(hidden, example.targets, inputs["input_ids"])
    return tuple(tensor.numpy().tobytes() for tensor in inputs.values())


class _Labels:
    """Which class a label of the data is."""

    def __init__(self, config: Any, names: Sequence[str] | None) -> None:
        self._count = int(config.num_labels)
        self.is_number = self._count == 1 and config.problem_type != "single_label_classification"
        if config.problem_type == "multi_label_classification":
            raise UnsupportedError("the head gives several labels at once; recover needs one")
        if names is not None and len(names) != self._count:
            raise UsageError(f"labels: {len(names)} names for a head of {self._count} classes")
        known = config.id2label or {}
        self._names = list(names or (str(known.get(i, i)) for i in range(self._count)))

    def target(self, label: Any, where: str) -> Tensor:
        """The class of a label, or the number that a head of one output should give.

        Raises:
            UsageError: the head has no such class.
        """
        if self.is_number:
            try:
                number = torch.tensor(float(label))
            except (TypeError, ValueError) as cause:
                raise UsageError(f"{where}: label {label!r} is not a number") from cause
            if not number.isfinite():
                raise UsageError(f"{where}: label {label!r} is not a finite number")
            return number
        if str(label) in self._names:
            return torch.tensor(self._names.index(str(label)))
        if str(label).isdecimal() and int(label) < self._count:
            return torch.tensor(int(label))
        raise UsageError(
            f"{where}: label {label!r} is none of the head's {self._count} classes "
            f"({', '.join(self._names[:8])}{', …' if self._count > 8 else ''}); --labels names "
            "them in the head's order"
        )


class _TextReader:
    """Makes examples of one file for a model that reads tokens."""

    def __init__(
        self,
        path: Path,
        skeleton: Skeleton,
        folder: Path,
        task: Task,
        window: int | None,
        seed: int,
    ) -> None:
        config = skeleton.config
        self._path = path
        self._task = task
        self._vocabulary = int(config.get_text_config().vocab_size)
        self._tokenizer = needed_tokenizer(folder)
        self._start = decoder_start_token(config)
        self._end = getattr(config, "eos_token_id", None)
        self._generator = torch.Generator().manual_seed(seed)
        self._first, self._last = _added(self._tokenizer)
        if task == "causal":
            self._last = []
        self.window = _window(config, window, len(self._first) + len(self._last))

    def unlabelled(self) -> Iterator[Example]:
        """Examples for a model that predicts tokens."""
        if self._path.suffix not in (".jsonl", ".json"):
            yield from self._of_whole(read_text(self._path))
            return
        for where, row in _json_rows(self._path):
            yield from self._of_row(where, row)

    def labelled(self, labels: _Labels) -> Iterator[Example]:
        """Examples for a classifier."""
        rows = _csv_rows if self._path.suffix == ".csv" else _json_rows
        for where, row in rows(self._path):
            text = _field(row, "text", where)
            pair = _field(row, "text_pair", where) if row.get("text_pair") else None
            if row.get("label") in (None, ""):
                raise UsageError(f"{where}: has no 'label'")
            read = self._tokenizer(text, pair, truncation=True, max_length=self.window)
            inputs = {n: torch.tensor(v) for n, v in read.items() if n in _TOKEN_ARGUMENTS}
            self._check(inputs["input_ids"])
            yield Example(inputs, labels.target(row["label"], where))

    def _of_row(self, where: str, row: Mapping[str, Any]) -> Iterator[Example]:
        if "prompt" in row:
            if self._task == "masked":
                raise UsageError(f"{where}: has a 'prompt'; a masked model takes 'text'")
            prompt, completion = map(self._tokens, self._asked_and_answered(row, where))
            yield self._of_pair(prompt, completion, rendered=isinstance(row["prompt"], list))
        elif "messages" in row:
            tokens = self._tokens(self._rendered(row["messages"], where))
            for part in torch.split(tokens, self.window):
                yield self._of_text(part, begins=False)
        else:
            text = _field(row, "text", where, "'text', 'messages', or 'prompt' and 'completion'")
            yield from map(self._of_text, torch.split(self._tokens(text), self.window))

    def _of_whole(self, text: str) -> Iterator[Example]:
        """Windows of a text, without what is left at its end."""
        tokens = self._tokens(text)
        if len(tokens) < self.window:
            raise UsageError(
                f"{self._path}: has {len(tokens)} tokens, fewer than one window of {self.window}; "
                "give more text, or a shorter --window"
            )
        whole = tokens[: len(tokens) // self.window * self.window]
        return map(self._of_text, torch.split(whole, self.window))

    def _asked_and_answered(self, row: Mapping[str, Any], where: str) -> tuple[str, str]:
        """Prompt and completion: as they are, or one conversation by the chat template."""
        prompt, completion = row["prompt"], row.get("completion")
        if prompt and completion and isinstance(prompt, str) and isinstance(completion, str):
            return prompt, completion
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise UsageError(
                f"{where}: 'prompt' and 'completion' are two texts, or two lists of messages"
            )
        asked = self._rendered(prompt, where, asks=True)
        whole = self._rendered(prompt + completion, where)
        if not whole.startswith(asked):
            raise UsageError(
                f"{where}: the chat template renders the prompt otherwise where an answer follows; "
                "give 'messages'"
            )
        return asked, whole.removeprefix(asked)

    def _rendered(self, said: Any, where: str, *, asks: bool = False) -> str:
        """A list of messages by the chat template, perhaps up to where the model answers."""
        if not isinstance(said, list) or not said:
            raise UsageError(f"{where}: has no list of messages")
        if not self._tokenizer.chat_template:
            raise UsageError(f"{where}: holds messages, but the tokenizer has no chat template")
        try:
            text = self._tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=asks
            )
            return cast(str, text)
        except Exception as cause:  # templates raise errors of many kinds
            raise UsageError(
                f"{where}: the chat template cannot render it ({first_line(cause)})"
            ) from cause

    def _of_text(self, tokens: Tensor, *, begins: bool = True) -> Example:
        """An example of a window of text, with the tokens added at its beginning if it has one."""
        if self._task == "seq2seq":
            half = max(1, len(tokens) // 2)
            return self._of_pair(tokens[:half], tokens[half:])
        if self._task == "masked":
            return self._masked(tokens)
        tokens = self._between(tokens) if begins else tokens
        return Example({"input_ids": tokens}, tokens)

    def _of_pair(self, prompt: Tensor, completion: Tensor, *, rendered: bool = False) -> Example:
        """An example of which only the completion counts; one rendered has its own ends."""
        if self._task == "seq2seq":
            answer = self._ended(self._between(completion[: self.window]))
            shifted = torch.cat([torch.tensor([self._start]), answer[:-1]])
            asked = self._between(prompt[: self.window])
            return Example({"input_ids": asked, "decoder_input_ids": shifted}, answer)
        completion = (completion if rendered else self._ended(completion))[: self.window]
        kept = prompt[max(0, len(prompt) + len(completion) - self.window) :]
        kept = kept if rendered else self._between(kept)
        tokens = torch.cat([kept, completion])
        targets = tokens.clone()
        targets[: len(kept)] = IGNORED
        return Example({"input_ids": tokens}, targets)

    def _between(self, tokens: Tensor) -> Tensor:
        """Tokens of a text between those that the tokenizer adds."""
        return torch.cat([tokens.new_tensor(self._first), tokens, tokens.new_tensor(self._last)])

    def _ended(self, tokens: Tensor) -> Tensor:
        """An answer with the token that ends it, if the model has one."""
        ends = self._end if isinstance(self._end, list) else [self._end]
        if ends[0] is None or (len(tokens) and int(tokens[-1]) in ends):
            return tokens
        return torch.cat([tokens, tokens.new_tensor(ends[:1])])

    def _masked(self, tokens: Tensor) -> Example:
        mask = self._tokenizer.mask_token_id
        if mask is None:
            raise UsageError(f"{self._path}: the tokenizer has no mask token")
        hidden = torch.rand(len(tokens), generator=self._generator) < _SHARE_MASKED
        hidden[int(torch.randint(len(tokens), (), generator=self._generator))] = True
        ids = self._between(tokens.masked_fill(hidden, int(mask)))
        targets = torch.full_like(ids, IGNORED)
        first = len(self._first)
        targets[first : first + len(tokens)] = tokens.masked_fill(~hidden, IGNORED)
        return Example({"input_ids": ids}, targets)

    def _tokens(self, text: str) -> Tensor:
        found = self._tokenizer(text, add_special_tokens=False).input_ids
        tokens = torch.tensor(found, dtype=torch.long)
        self._check(tokens)
        return tokens

    def _check(self, tokens: Tensor) -> None:
        if not len(tokens):
            raise UsageError(f"{self._path}: holds no text, or a row without any")
        if int(tokens.max()) >= self._vocabulary:
            raise UsageError(
                f"{self._path}: the tokenizer gives token {int(tokens.max())}, but the model has "
                f"{self._vocabulary}"
            )


_TOKEN_ARGUMENTS = ("input_ids", "token_type_ids")


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer adds by itself before a text, and behind it."""
    whole = tokenizer("a").input_ids
    alone = tokenizer("a", add_special_tokens=False).input_ids
    for first in range(len(whole) - len(alone) + 1):
        if whole[first : first + len(alone)] == alone:
            return whole[:first], whole[first + len(alone) :]
    return [], []


def _window(config: Any, asked: int | None, ends: int) -> int:
    """How many tokens an example has at most, beside those at its ends."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(2, most - SPARE_POSITIONS - ends) if most else None
    if asked is None:
        return min(WINDOW, longest or WINDOW)
    if asked < 2 or (longest is not None and asked > longest):
        limit = f"2 to {longest}" if longest is not None else "at least 2"
        raise UsageError(f"window {asked}: the model takes {limit} tokens")
    return asked


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row of a JSONL file is, and the row."""
    for number, line in enumerate(read_text(path, whole_lines=True).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as cause:
            raise UsageError(f"{where}: is not JSON ({first_line(cause)})") from cause
        if not isinstance(row, dict):
            raise UsageError(f"{where}: is not a JSON object")
        yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row of a CSV file with a header is, and the row."""
    reader = csv.DictReader(io.StringIO(read_text(path, whole_lines=True), newline=""))
    is_cut = path.stat().st_size > TEXT_BYTES
    previous = None
    try:
        missing = {"text", "label"} - set(reader.fieldnames or ())
        if missing:
            raise UsageError(f"{path}: its header has no column '{min(missing)}'")
        for row in reader:
            if previous is not None:
                yield previous
            previous = f"{path}: line {reader.line_num}", row
    except csv.Error as cause:
        raise UsageError(f"{path}: line {reader.line_num}: {cause}") from cause
    if previous is not None and not is_cut:  # else perhaps within a field of several lines
        yield previous


def _field(row: Mapping[str, Any], name: str, where: str, wanted: str = "") -> str:
    found = row.get(name)
    if not isinstance(found, str) or not found:
        raise UsageError(f"{where}: has no {wanted or repr(name)}")
    return found


def _image_examples(path: Path, folder: Path, labels: _Labels) -> Iterator[Example]:
    """Images in folders that are named by their labels."""
    try:
        from PIL import Image
    except ImportError as cause:
        raise MissingExtraError("images need pillow: pip install 'psoft-export[vision]'") from cause
    if not path.is_dir():
        raise UsageError(f"{path}: images are given as a folder with one folder for each label")
    processor = _image_processor(folder)
    for kind in sorted(p for p in path.iterdir() if p.is_dir() and not _is_hidden(p)):
        target = labels.target(kind.name, str(kind))
        for file in sorted(kind.iterdir()):
            if file.suffix.lower() not in _PICTURES or _is_hidden(file):
                continue
            try:
                with Image.open(file) as image:
                    pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
            except OSError as cause:
                raise UsageError(f"{file}: is no image that pillow reads") from cause
            yield Example({"pixel_values": pixels[0]}, target)


def _is_hidden(path: Path) -> bool:
    """Whether it is what a file manager, say, left there."""
    return path.name.startswith(".")


def _image_processor(folder: Path) -> Callable[..., Mapping[str, Tensor]]:
    processors: Any = AutoImageProcessor
    try:
        made = processors.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as cause:  # processor classes raise errors of many kinds
        raise UsageError(
            f"{folder}: has no image processor that transformers can read ({first_line(cause)})"
        ) from cause
    return cast(Callable[..., Mapping[str, Tensor]], made)


def sampled(examples: Sequence[Example], most: int) -> Sequence[Example]:
    """So many examples at most, in their order, and the same at every call.

    Drawn, as every second one of labels that take turns would be of one class.
    """
    if len(examples) <= most:
        return examples
    drawing = torch.Generator().manual_seed(0)
    places = torch.randperm(len(examples), generator=drawing)[:most]
    return [examples[place] for place in places.sort().values.tolist()]


def collate(rows: Sequence[Example], pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments and targets of one batch, padded on the right.

    Args:
        rows: of one task.
        pad: the token that pads.
    """
    arguments = {}
    for name in rows[0].inputs:
        parts = [row.inputs[name] for row in rows]
        if name == "pixel_values":
            arguments[name] = torch.stack(parts)
            continue
        fill = pad if name.endswith("input_ids") else 0
        arguments[name] = _padded(parts, fill)
        if name == "input_ids" and len({len(part) for part in parts}) > 1:
            arguments["attention_mask"] = _padded([torch.ones_like(part) for part in parts], 0)
    targets = [row.targets for row in rows]
    return arguments, _padded(targets, IGNORED) if targets[0].ndim else torch.stack(targets)


def _padded(parts: Sequence[Tensor], fill: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=fill)


def data_sha256(path: Path) -> str:
    """Of a file, or of all files under a folder in order of their names."""
    if path.is_file():
        return file_sha256(path, UsageError)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file_sha256(file, UsageError)}\n".encode())
    return digest.hexdigest()
