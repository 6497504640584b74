"""The Llama shapes that are measured: sizes and tensor names. No tensors, no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A Llama with untied embeddings."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    layers: int

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(rows * columns for _, (rows, columns) in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and (rows, columns) of every tensor; a vector is a single row."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for path, extents in self.linears().items():
                yield f"{prefix}.{path}.weight", extents
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}.{norm}.weight", (1, self.hidden)
        yield "model.norm.weight", (1, self.hidden)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Path in a layer → (out, in) of its seven linear maps, in the order of `TARGETS`."""
        narrow = self.hidden // self.heads * self.key_value_heads
        extents = (
            (self.hidden, self.hidden),
            (narrow, self.hidden),
            (narrow, self.hidden),
            (self.hidden, self.hidden),
            (self.intermediate, self.hidden),
            (self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        )
        blocks = ("self_attn",) * 4 + ("mlp",) * 3
        return {
            f"{block}.{name}": extent
            for block, name, extent in zip(blocks, TARGETS, extents, strict=True)
        }


def _tiny_llama(layers: int) -> Shape:
    """The widths of TinyLlama-1.1B: sizes differ in depth, never in the largest layer."""
    return Shape(2048, 5632, 32, 4, 32000, layers)


SHAPES = {
    "tiny": Shape(128, 352, 4, 2, 512, 2),
    "0.5b": _tiny_llama(8),
    "1b": _tiny_llama(20),
}
