"""The heads of real models, and the size of one call."""

from dataclasses import dataclass

HEADS = {  # (vocabulary, hidden size), with the padding of the model's lm_head
    "SmolLM2-135M": (49152, 576),
    "Qwen2.5-0.5B": (151936, 896),
    "Qwen2.5-7B": (152064, 3584),
    "Llama-3.1-8B": (128256, 4096),
    "Gemma-3-1B": (262144, 1152),
    "small": (8192, 256),
    "tiny": (512, 32),
}


@dataclass(frozen=True)
class Shape:
    """One call: N tokens, a head of V rows and H columns on each side."""

    tokens: int
    vocab: int
    hidden: int
    dtype: str = "bfloat16"  # of the operands of the products
    trained: bool = True  # the head gets a gradient
    shared: bool = False  # teacher and student project with the same head
    cast: bool = False  # fp32 heads that autocast rounds to `dtype`

    @property
    def item(self) -> int:
        """Bytes of an operand's entry."""
        return 4 if self.dtype == "float32" else 2

    @property
    def product(self) -> float:
        """FLOPs of one product of all tokens with the head."""
        return 2.0 * self.tokens * self.vocab * self.hidden

    @property
    def bare(self) -> float:
        """FLOPs of the products that no design avoids: both sides' logits, dX, and dW of a trained head."""
        return self.product * (4 if self.trained else 3)
