"""Multiply-adds of one image's forward pass, by counting matrix products: the paper's way, and as they run. App. M.

The paper's GFLOPs are multiply-adds. For encoder and decoder they leave out the two attention products; for DiT they
have them, with the output projection but no embedding, and count the head's adaLN once an image, although it runs once
a token. FLOPs as they run are two a multiply-add.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one forward of one image."""

    paper: int  # as the paper counts
    executed: int  # every matrix product that runs

    def __add__(self, other: "Macs") -> "Macs":
        return Macs(self.paper + other.paper, self.executed + other.executed)


def swiglu_hidden(width: int, ratio: float) -> int:
    """Hidden channels of SwiGLU: int(2/3 x int(ratio x width))."""
    return int(2 / 3 * int(ratio * width))


def attention_macs(tokens: int, width: int) -> int:
    """The two products of attention: scores, and scores times values."""
    return 2 * tokens**2 * width


def dit_blocks(*, tokens: int, width: int, depth: int, mlp_ratio: float, modulations: int) -> Macs:
    """DiT blocks; `modulations`: how often adaLN runs, 1 in a backbone, `tokens` in the DDT head."""
    linear = tokens * (4 * width**2 + 3 * width * swiglu_hidden(width, mlp_ratio))
    block = linear + attention_macs(tokens, width)
    adaln = 6 * width**2
    return Macs(depth * (block + adaln), depth * (block + modulations * adaln))


def diffusion_macs(
    *,
    in_channels: int,
    input_size: int,
    patch_size: int = 1,
    width: int,
    depth: int,
    head_width: int | None = None,
    head_depth: int | None = None,
    mlp_ratio: float = 4.0,
) -> Macs:
    """A DiT, or with a head a DiT-DH. Tables 15 and 18."""
    tokens = (input_size // patch_size) ** 2
    patch = in_channels * patch_size**2
    backbone = dit_blocks(tokens=tokens, width=width, depth=depth, mlp_ratio=mlp_ratio, modulations=1)
    backbone += Macs(0, tokens * patch * width + 512 * width + width**2)  # patches, time
    if not (head_width and head_depth):
        return backbone + final_macs(tokens=tokens, width=width, out_channels=patch, modulations=1)
    head = head_macs(tokens=tokens, width=head_width, depth=head_depth, out_channels=patch, mlp_ratio=mlp_ratio)
    again = tokens * patch * head_width  # the head reads the noisy map anew
    return backbone + head + Macs(0, again + (tokens * width * head_width if width != head_width else 0))


def head_macs(*, tokens: int, width: int, depth: int, out_channels: int, mlp_ratio: float = 4.0) -> Macs:
    """A DDT head's blocks and output; as they run, adaLN is once a token. Table 15."""
    blocks = dit_blocks(tokens=tokens, width=width, depth=depth, mlp_ratio=mlp_ratio, modulations=tokens)
    return blocks + final_macs(tokens=tokens, width=width, out_channels=out_channels, modulations=tokens)


def final_macs(*, tokens: int, width: int, out_channels: int, modulations: int) -> Macs:
    """The last layer: adaLN, and the output projection."""
    projection = tokens * width * out_channels
    return Macs(projection, projection + modulations * 2 * width**2)


def vit_macs(*, tokens: int, width: int, depth: int, mlp_width: int) -> Macs:
    """Plain transformer blocks of an encoder or a decoder."""
    linear = depth * tokens * (4 * width**2 + 2 * width * mlp_width)
    return Macs(linear, linear + depth * attention_macs(tokens, width))


def decoder_macs(
    *, in_channels: int, tokens_side: int, width: int, depth: int, mlp_width: int, patch_size: int
) -> Macs:
    """A ViT decoder, its class token among the tokens. Tables 1b and 18."""
    tokens = tokens_side**2 + 1
    ends = tokens_side**2 * in_channels * width + tokens * width * 3 * patch_size**2
    return vit_macs(tokens=tokens, width=width, depth=depth, mlp_width=mlp_width) + Macs(ends, ends)


def discriminator_macs(*, tokens_side: int, patch_size: int, width: int, depth: int, heads: int, kernel: int) -> Macs:
    """The frozen ViT of a discriminator and its heads: convolutions of 1, of `kernel` and of 1 over the patches."""
    frozen = encoder_macs(
        tokens_side=tokens_side,
        prefix_tokens=1,
        width=width,
        depth=depth,
        mlp_width=4 * width,
        patch_size=patch_size,
    )
    trained = heads * tokens_side**2 * ((1 + kernel) * width**2 + width)
    return frozen + Macs(trained, trained)


def encoder_macs(
    *, tokens_side: int, prefix_tokens: int, width: int, depth: int, mlp_width: int, patch_size: int
) -> Macs:
    """A ViT encoder, its class and register tokens among the tokens. Table 18."""
    patches = tokens_side**2 * 3 * patch_size**2 * width
    tokens = tokens_side**2 + prefix_tokens
    return vit_macs(tokens=tokens, width=width, depth=depth, mlp_width=mlp_width) + Macs(patches, patches)
