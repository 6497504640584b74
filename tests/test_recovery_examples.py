"""Data of a task, read into examples: every kind of file, and what is wrong with some."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from psoft_export.errors import UnsupportedError, UsageError
from psoft_export.model.skeleton import Skeleton
from psoft_export.recovery.examples import (
    IGNORED,
    Example,
    Examples,
    collate,
    read_examples,
    sampled,
)
from tests.conftest import EXAMPLES
from tests.models import FAMILIES, MINILM

BASE = EXAMPLES / "base"
TEXT = " ".join(f"The quick brown fox jumps over {n} lazy dogs." for n in range(60))
LINES = [{"text": f"line {number} of a text"} for number in range(12)]


def causal() -> Skeleton:
    config = transformers.AutoConfig.from_pretrained(BASE)
    return Skeleton(transformers.LlamaForCausalLM, config)


def bert(head: str, **more: Any) -> Skeleton:
    config = transformers.AutoConfig.from_pretrained(MINILM, **more)
    return Skeleton(getattr(transformers, f"BertFor{head}"), config)


def written(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def every(examples: Examples) -> list[Any]:
    return [*examples.train, *examples.held_out]


def test_a_text_becomes_windows_of_which_every_fifth_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "task.txt"
    file.write_text(TEXT)
    found = read_examples(file, causal(), BASE, window=64)
    whole = AutoTokenizer.from_pretrained(BASE)(TEXT, add_special_tokens=False).input_ids
    assert len(every(found)) == len(whole) // 64
    assert found.held_out[0].inputs["input_ids"].tolist() == whole[4 * 64 : 5 * 64]
    assert found.train[4].inputs["input_ids"].tolist() == whole[5 * 64 : 6 * 64]
    assert found.words == f"{len(whole) // 64} windows of up to 64 tokens of task.txt"


def test_of_prompt_and_completion_only_the_completion_counts(tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2 = ", "completion": f"{number}"} for number in range(10)]
    found = read_examples(written(tmp_path / "a.jsonl", rows), causal(), BASE)
    example = found.train[0]
    counted = example.targets[example.targets != IGNORED]
    end = causal().config.eos_token_id
    assert counted.tolist() == [ord("0"), end]
    assert example.inputs["input_ids"].tolist() == [*b"2 + 2 = 0", end]


def test_texts_begin_as_the_tokenizer_lets_them(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    begin, end = ord("^"), ord("~")
    tokens = [(tokenizer.convert_ids_to_tokens(token), token) for token in (begin, end)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokens[0][0]} $A {tokens[1][0]}", special_tokens=tokens
    )
    tokenizer.chat_template = (
        f"{tokens[0][0]}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
    )
    tokenizer.save_pretrained(folder)
    text = tmp_path / "task.txt"
    text.write_text(TEXT)
    example = read_examples(text, causal(), folder, window=64).train[1]
    assert example.inputs["input_ids"].tolist() == [begin, *TEXT[64:128].encode()]
    rows = [{"prompt": "2 + ", "completion": f"{number}"} for number in range(10)]
    example = read_examples(written(tmp_path / "a.jsonl", rows), causal(), folder).train[0]
    ends = causal().config.eos_token_id
    assert example.inputs["input_ids"].tolist() == [begin, *b"2 + 0", ends]
    assert example.targets.tolist() == [IGNORED] * 5 + [*b"0", ends]
    chats = [{"messages": [{"role": "user", "content": f"hi {n}"}]} for n in range(10)]
    example = read_examples(written(tmp_path / "b.jsonl", chats), causal(), folder).train[0]
    assert example.inputs["input_ids"].tolist() == [begin, *b"hi 0"]
    config = FAMILIES["t5"].config()
    config.vocab_size, config.eos_token_id = 300, end
    skeleton = Skeleton(transformers.T5ForConditionalGeneration, config)
    example = read_examples(written(tmp_path / "c.jsonl", rows), skeleton, folder).train[0]
    assert example.inputs["input_ids"].tolist() == [begin, *b"2 + ", end]
    assert example.targets.tolist() == [begin, *b"0", end]


def test_messages_are_rendered_by_the_chat_template(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    rows = [{"messages": [{"role": "user", "content": f"hi {n}"}]} for n in range(10)]
    file = written(tmp_path / "chat.jsonl", rows)
    found = read_examples(file, causal(), folder)
    assert bytes(found.train[0].inputs["input_ids"].tolist()) == b"<user>hi 0"
    with pytest.raises(UsageError, match=r"chat\.jsonl: line 1: holds messages, but the tokenizer"):
        read_examples(file, causal(), BASE)


def test_prompt_and_completion_may_be_parts_of_a_conversation(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    said = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    tokenizer.chat_template = "!" + said + "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.save_pretrained(folder)
    rows: list[dict[str, Any]] = [
        {
            "prompt": [{"role": "user", "content": f"hi {n}"}],
            "completion": [{"role": "assistant", "content": "yes"}],
        }
        for n in range(10)
    ]
    file = written(tmp_path / "a.jsonl", rows)
    example = read_examples(file, causal(), folder).train[0]
    assert bytes(example.inputs["input_ids"].tolist()) == b"!<user>hi 0|<assistant>yes|"
    counted = example.targets[example.targets != IGNORED]
    assert bytes(counted.tolist()) == b"yes|", "the template's own end, and no other"
    rows[3]["completion"] = "yes"
    with pytest.raises(UsageError, match=r"line 4: 'prompt' and 'completion' are two texts, or"):
        read_examples(written(file, rows), causal(), folder)
    tokenizer.chat_template = "{{ messages | length }}" + said
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match="line 1: the chat template renders the prompt otherwise"):
        read_examples(written(file, rows), causal(), folder)


def test_a_sequence_to_sequence_model_reads_pairs_or_halves(tmp_path: Path) -> None:
    config = FAMILIES["t5"].config()
    config.vocab_size, config.eos_token_id = 300, 1
    skeleton = Skeleton(transformers.T5ForConditionalGeneration, config)
    rows = [{"prompt": "abc", "completion": f"{n}e"} for n in range(10)]
    found = read_examples(written(tmp_path / "a.jsonl", rows), skeleton, BASE)
    example = found.train[0]
    assert example.inputs["input_ids"].tolist() == [*b"abc"]
    assert example.targets.tolist() == [*b"0e", 1]
    start = config.pad_token_id
    assert example.inputs["decoder_input_ids"].tolist() == [start, *b"0e"]
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    example = read_examples(text, skeleton, BASE, window=64).train[0]
    assert len(example.inputs["input_ids"]) == 32
    assert example.targets.tolist() == [*TEXT[32:64].encode(), 1]


def test_of_a_masked_model_what_was_masked_counts(tmp_path: Path) -> None:
    file = tmp_path / "task.txt"
    file.write_text(TEXT)
    found = read_examples(file, bert("MaskedLM"), MINILM, window=32, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    whole = tokenizer(TEXT, add_special_tokens=False).input_ids
    example = found.train[0]
    ids, targets = example.inputs["input_ids"], example.targets
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id
    counted = targets != IGNORED
    assert counted.any()
    assert (ids[counted] == tokenizer.mask_token_id).all()
    assert torch.where(counted, targets, ids)[1:-1].tolist() == whole[:32]
    again = read_examples(file, bert("MaskedLM"), MINILM, window=32, seed=3).train[0]
    assert torch.equal(again.targets, targets)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_labels_are_names_or_numbers(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"text {n}", "label": ("bad", "good", "1")[n % 3]} for n in range(10)]
    file = tmp_path / f"reviews.{suffix}"
    if suffix == "csv":
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
        file.write_text("\n".join(lines))
    else:
        written(file, rows)
    skeleton = bert("SequenceClassification", num_labels=2)
    found = read_examples(file, skeleton, MINILM, labels=["bad", "good"])
    assert [int(example.targets) for example in found.train[:3]] == [0, 1, 1]
    with pytest.raises(UsageError, match=r"label 'bad' is none of the head's 2 classes"):
        read_examples(file, skeleton, MINILM)
    with pytest.raises(UsageError, match=r"labels: 3 names for a head of 2 classes"):
        read_examples(file, skeleton, MINILM, labels=["a", "b", "c"])


def test_a_head_of_one_number_takes_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"a{n}", "text_pair": "b", "label": n / 4} for n in range(10)]
    skeleton = bert("SequenceClassification", num_labels=1)
    found = read_examples(written(tmp_path / "a.jsonl", rows), skeleton, MINILM)
    assert found.train[1].targets == 0.25
    assert found.train[1].inputs["token_type_ids"].max() == 1
    rows[2]["label"] = "much"
    with pytest.raises(UsageError, match=r"line 3: label 'much' is not a number"):
        read_examples(written(tmp_path / "b.jsonl", rows), skeleton, MINILM)


def test_what_repeats_counts_once(tmp_path: Path) -> None:
    rows = [{"text": f"text {number % 11}"} for number in range(40)]
    found = read_examples(written(tmp_path / "a.jsonl", rows), causal(), BASE)
    assert len(every(found)) == 11
    assert found.words == "11 windows of up to 256 tokens of a.jsonl"
    rows = [{"text": "word " * (1 + number % 12)} for number in range(60)]
    masked = read_examples(written(tmp_path / "b.jsonl", rows), bert("MaskedLM"), MINILM)
    assert len(every(masked)) == 12


def test_a_masked_window_leaves_room_for_its_ends(tmp_path: Path) -> None:
    file = tmp_path / "task.txt"
    file.write_text(TEXT)
    skeleton = bert("MaskedLM", max_position_embeddings=40)
    found = read_examples(file, skeleton, MINILM)
    assert max(len(example.inputs["input_ids"]) for example in every(found)) == 38


def test_of_a_long_file_the_last_row_of_the_first_mebibyte_is_left_away(tmp_path: Path) -> None:
    rows = [{"text": f"{number:06d}" + "x" * 1000} for number in range(1100)]
    found = read_examples(written(tmp_path / "a.jsonl", rows), causal(), BASE, window=1000)
    assert 1000 < len(every(found)) < 2200


def test_of_a_long_table_no_field_is_cut(tmp_path: Path) -> None:
    lines = "\n".join(["x" * 100] * 10)
    rows = (f'"{number} {lines}",{number % 2}' for number in range(1100))
    file = tmp_path / "a.csv"
    file.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    skeleton = bert("SequenceClassification", num_labels=2)
    assert 1000 < len(every(read_examples(file, skeleton, MINILM, window=8))) < 1100
    stray = ["text,label", '"no end,1', *(f"{number} x,0" for number in range(200_000))]
    file.write_text("\n".join(stray), encoding="utf-8")
    with pytest.raises(UsageError, match=r"a\.csv: line \d+: field larger than field limit"):
        read_examples(file, skeleton, MINILM)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    table = "text,label\n" + "".join(f"line {n},{n % 2}\n" for n in range(10))
    file = tmp_path / "a.csv"
    file.write_text(table, encoding="utf-8-sig")
    skeleton = bert("SequenceClassification", num_labels=2)
    assert len(every(read_examples(file, skeleton, MINILM))) == 10


def images(folder: Path, labels: Sequence[str] = ("0", "1")) -> Path:
    for label in labels:
        (folder / label).mkdir(parents=True)
        for number in range(6):
            colour = (40 * number, 40 * labels.index(label), 0)
            Image.new("RGB", (32, 32), colour).save(folder / label / f"{number}.png")
    return folder


def test_images_lie_in_folders_named_by_their_labels(tmp_path: Path) -> None:
    config = FAMILIES["vit"].config()
    config.num_labels = 2
    skeleton = Skeleton(transformers.ViTForImageClassification, config)
    base = tmp_path / "base"
    base.mkdir()
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    folder = images(tmp_path / "images")
    (folder / ".thumbnails").mkdir()
    (folder / "0" / "._0.png").write_bytes(b"of a file manager")
    found = read_examples(folder, skeleton, base)
    assert len(every(found)) == 12
    assert found.train[0].inputs["pixel_values"].shape == (3, 32, 32)
    assert [int(example.targets) for example in found.train] == [0] * 5 + [1] * 5
    with pytest.raises(UsageError, match=r"label 'cat' is none of the head's 2 classes"):
        read_examples(images(tmp_path / "others", ("cat", "dog")), skeleton, base)
    with pytest.raises(UsageError, match="has no image processor"):
        read_examples(tmp_path / "images", skeleton, tmp_path)


def test_a_sample_has_what_takes_turns_and_stays_in_order() -> None:
    examples = [Example({}, torch.tensor(number)) for number in range(200)]
    chosen = sampled(examples, 100)
    numbers = [int(example.targets) for example in chosen]
    assert numbers == sorted(set(numbers)) and len(numbers) == 100
    assert 35 < sum(number % 2 for number in numbers) < 65
    assert all(a is b for a, b in zip(sampled(examples, 100), chosen, strict=True))
    assert sampled(examples, 200) is examples


def test_rows_of_several_lengths_are_padded(tmp_path: Path) -> None:
    rows = [{"text": "a" * (number + 1)} for number in range(11)]  # the first predicts nothing
    found = read_examples(written(tmp_path / "a.jsonl", rows), causal(), BASE)
    arguments, targets = collate(found.train[:3], 258)
    pads = [258, 258]
    assert arguments["input_ids"].tolist() == [[97] * (2 + n) + pads[n:] for n in range(3)]
    assert arguments["attention_mask"].sum(1).tolist() == [2, 3, 4]
    assert targets[0].tolist() == [97, 97, IGNORED, IGNORED]


BAD: dict[str, tuple[str, str, str]] = {
    "nothing": ("a.txt", "", "holds no text"),
    "short": ("a.txt", "abc", "has 3 tokens, fewer than one window of 256"),
    "few": ("a.txt", TEXT[:1000], "gives 3 different examples; at least 10 are needed"),
    "not JSON": ("a.jsonl", "{", r"line 1: is not JSON"),
    "no object": ("a.jsonl", "[1]", "line 1: is not a JSON object"),
    "no text": ("a.jsonl", '{"label": 1}', "has no 'text', 'messages', or 'prompt'"),
    "no completion": (
        "a.jsonl",
        '{"prompt": "a"}',
        "line 1: 'prompt' and 'completion' are two texts",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_examples(file, causal(), BASE)
    assert str(file) in str(caught.value)


REFUSED: dict[str, tuple[Callable[[], Skeleton], dict[str, Any], str]] = {
    "labels without classes": (causal, {"labels": ["a"]}, "LlamaForCausalLM has no classes"),
    "a window too long": (causal, {"window": 10**6}, "window 1000000: the model takes 2 to"),
    "no column": (lambda: bert("SequenceClassification"), {}, "line 1: has no 'label'"),
}
UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "a prompt to a masked model": (
        "MaskedLM",
        {"prompt": "a", "completion": "b"},
        "line 1: has a 'prompt'; a masked model takes 'text'",
    ),
    "a pair that is no text": (
        "SequenceClassification",
        {"text": "a", "text_pair": 3, "label": 0},
        "line 1: has no 'text_pair'",
    ),
    "few rows": (
        "SequenceClassification",
        {"text": "a", "label": 0},
        r"one in 5 is held out; give more$",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    head, row, message = UNFIT[case]
    with pytest.raises(UsageError, match=message):
        read_examples(written(tmp_path / "a.jsonl", [row]), bert(head, num_labels=2), MINILM)


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    skeleton, options, message = REFUSED[case]
    folder = MINILM if case == "no column" else BASE
    with pytest.raises(UsageError, match=message):
        read_examples(written(tmp_path / "a.jsonl", LINES), skeleton(), folder, **options)


def test_a_class_without_a_task_is_unsupported(tmp_path: Path) -> None:
    skeleton = Skeleton(transformers.BertModel, transformers.AutoConfig.from_pretrained(MINILM))
    with pytest.raises(UnsupportedError, match="BertModel: signs are recovered by a task's loss"):
        read_examples(written(tmp_path / "a.jsonl", LINES), skeleton, MINILM)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    with pytest.raises(UsageError, match="has no tokenizer that transformers can read"):
        read_examples(file, causal(), tmp_path)
