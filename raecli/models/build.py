"""The only place where a recipe's block becomes a module."""

from torch import nn

from raecli.models.baselines import PixelEncoder, VaeDecoder, VaeEncoder, build_vae
from raecli.models.decoder import Decoder
from raecli.models.dit import DiT, DiTDH
from raecli.models.encoder import Encoder, build_encoder
from raecli.recipe.blocks import DecoderSpec, DiffusionModelSpec, EncoderSpec

FrozenEncoder = Encoder | PixelEncoder | VaeEncoder


def encoder_of(spec: EncoderSpec) -> FrozenEncoder:
    """The frozen encoder, its weights loaded and checked: images in [0, 1] to un-normalised latents."""
    if spec.loader == "pixels":
        return PixelEncoder()
    if spec.loader == "diffusers":
        return VaeEncoder(vae_of(spec), **vae_scale(spec))
    return build_encoder(**{name: getattr(spec, name) for name in ENCODER_FIELDS})


def baseline_decoder_of(spec: EncoderSpec) -> nn.Module:
    """Un-normalised latents of `pixels` or of an AutoencoderKL to pixels in [-1, 1], which mean and std of .5 undo."""
    if spec.loader == "pixels":
        return nn.Identity()
    return VaeDecoder(vae_of(spec), **vae_scale(spec))


def vae_of(spec: EncoderSpec) -> nn.Module:
    """diffusers' AutoencoderKL of a spec, its weights loaded and checked."""
    return build_vae(
        path=str(spec.path), weights=str(spec.weights), latent_channels=spec.width, patch_size=spec.patch_size
    )


def vae_scale(spec: EncoderSpec) -> dict[str, float]:
    """How an AutoencoderKL's latents are scaled."""
    assert spec.scaling_factor is not None, "an AutoencoderKL's spec tells its scaling factor"
    return {"scaling_factor": spec.scaling_factor, "shift_factor": spec.shift_factor or 0.0}


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
    "layers",
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
