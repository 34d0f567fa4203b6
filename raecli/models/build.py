"""The only place where a recipe's block becomes a module."""

from raecli.models.decoder import Decoder
from raecli.models.dit import DiT, DiTDH
from raecli.models.encoder import Encoder, build_encoder
from raecli.recipe.blocks import DecoderSpec, DiffusionModelSpec, EncoderSpec


def encoder_of(spec: EncoderSpec) -> Encoder:
    """The frozen encoder, its weights loaded and checked."""
    return build_encoder(**{name: getattr(spec, name) for name in ENCODER_FIELDS})


ENCODER_FIELDS = (
    "loader",
    "architecture",
    "path",
    "weights",
    "family",
    "input_size",
    "patch_size",
    "width",
    "prefix_tokens",
    "norm_eps",
    "position_antialias",
    "mean",
    "std",
)


def decoder_of(spec: DecoderSpec, encoder: EncoderSpec) -> Decoder:
    """A decoder for an encoder's latents, freshly initialised."""
    return Decoder(
        in_channels=encoder.width,
        tokens_side=encoder.tokens_side,
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        mlp_width=spec.mlp_width,
        patch_size=spec.patch_size,
    )


def diffusion_of(spec: DiffusionModelSpec) -> DiT | DiTDH:
    """A DiT or DiT-DH, freshly initialised. The spec is resolved: in_channels, input_size and num_classes are told."""
    sizes = spec.model_dump(exclude={"kind", "class_conditional"})
    if spec.kind == "dit_dh":
        return DiTDH(**sizes)
    return DiT(**{name: value for name, value in sizes.items() if not name.startswith("head_")})
