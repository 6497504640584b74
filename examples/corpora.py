"""The texts that the example models learn from: the machine's own Python, or a seeded generator.

It reads and generates text only; it knows no tokenizer, no model and no training.
"""

import json
import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

# pydoc_data is the prose corpus; encodings and _sysconfigdata are tables and this machine's paths.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}
GIVEN_NAMES = ["Ada", "Boris", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jun"]
FAMILY_NAMES = ["Abara", "Bianchi", "Costa", "Dubois", "Eriksen", "Fischer", "Garcia", "Haddad"]
CITIES = ["Accra", "Bergen", "Cordoba", "Dakar", "Essen", "Fukuoka", "Graz", "Hanoi", "Izmir"]
TAGS = ["express", "fragile", "gift", "invoice", "partial", "refund", "repeat", "urgent"]


@dataclass(frozen=True)
class Corpus:
    """One text in two disjoint parts: the one trained on, and the one only measured."""

    train: str
    held_out: str


def python_sources() -> Corpus:
    """Sources of the Python standard library; every 20th file is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    ]
    return _split([path.read_text(encoding="utf-8") for path in files], every=20)


def documentation_prose() -> Corpus:
    """Topics of Python's language reference, as `help()` shows them; every 6th is held out."""
    return _split([topics[name] for name in sorted(topics)], every=6)


def arithmetic() -> Corpus:
    """Sums, differences and products of whole numbers, one equation a line."""
    return _generate(_equation, train_lines=40_000, held_out_lines=2_000)


def json_records() -> Corpus:
    """Orders of a made-up shop as JSON, one record a line."""
    return _generate(_record, train_lines=6_000, held_out_lines=300)


# The text that each adapter of `train.py` was trained on.
CORPORA: dict[str, Callable[[], Corpus]] = {
    "prose-relaxed-r64": documentation_prose,
    "arithmetic-strict-r32": arithmetic,
    "records-neumann-r48": json_records,
}


def _split(texts: list[str], every: int) -> Corpus:
    """Hold out whole texts, one in `every`, so that no text is on both sides."""
    train = [text for index, text in enumerate(texts) if index % every != every - 1]
    return Corpus(train="\n".join(train), held_out="\n".join(texts[every - 1 :: every]))


def _generate(
    line: Callable[[random.Random], str], train_lines: int, held_out_lines: int
) -> Corpus:
    """Draw both parts from streams of their own; a line seen in training is not held out."""
    train_stream, held_out_stream = random.Random("train"), random.Random("held-out")
    train = [line(train_stream) for _ in range(train_lines)]
    seen = set(train)
    drawn = (line(held_out_stream) for _ in range(held_out_lines))
    return Corpus(
        train="".join(train), held_out="".join(text for text in drawn if text not in seen)
    )


def _equation(stream: random.Random) -> str:
    sign = stream.choice("+-*")
    left, right = stream.randrange(1000), stream.randrange(10 if sign == "*" else 1000)
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return f"{left} {sign} {right} = {value}\n"


def _record(stream: random.Random) -> str:
    quantity, cents = stream.randrange(1, 10), stream.randrange(100, 10_000)
    record = {
        "id": stream.randrange(10_000, 100_000),
        "customer": f"{stream.choice(GIVEN_NAMES)} {stream.choice(FAMILY_NAMES)}",
        "city": stream.choice(CITIES),
        "quantity": quantity,
        "price": cents / 100,
        "total": quantity * cents / 100,
        "tags": sorted(stream.sample(TAGS, stream.randrange(4))),
        "paid": stream.random() < 0.7,
    }
    return json.dumps(record) + "\n"
