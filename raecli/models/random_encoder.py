"""An encoder of random weights: real images to tokens of any width, where no trained encoder is at hand."""

import torch
from torch import nn

from raecli.models.encoder import Encoder
from raecli.store.encoder_config import IMAGENET

PATCH_SIZE = 14
REGISTERS = 4
DEPTH = 12


def random_encoder(width: int, *, tokens_side: int, seed: int) -> Encoder:
    """A vision transformer of DINOv2-with-registers' layout (patch 14, 12 blocks) with timm's initial weights.

    width: channels n of a token, any number; heads of 64 channels where they fit. Its tokens are, as a trained
    encoder's, of mean 0 and variance 1 over channels; what they tell of an image is little more than a random
    projection of each patch (timm starts every block's LayerScale at 1e-5).
    """
    from timm.models.vision_transformer import VisionTransformer

    heads = max(1, width // 64)
    while width % heads:
        heads -= 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = VisionTransformer(
            img_size=tokens_side * PATCH_SIZE,
            patch_size=PATCH_SIZE,
            embed_dim=width,
            depth=DEPTH,
            num_heads=heads,
            reg_tokens=REGISTERS,
            no_embed_class=True,
            init_values=1e-5,
            num_classes=0,
            global_pool="",
        )
    backbone.norm = nn.Identity()  # the encoder has the last LayerNorm, without affine
    return Encoder(
        backbone,
        input_size=tokens_side * PATCH_SIZE,
        patch_size=PATCH_SIZE,
        width=width,
        prefix_tokens=1 + REGISTERS,
        norm_eps=1e-6,
        mean=IMAGENET[0],
        std=IMAGENET[1],
    )
