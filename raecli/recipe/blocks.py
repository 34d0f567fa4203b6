"""The blocks that recipes share: encoder, decoder, diffusion model, flow, optimiser, schedule."""

import math
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from raecli.recipe.spec import Count, Duration, NonNegative, Positive, Probability, Spec

Dtype = Literal["bf16", "fp16", "fp32", "int8"]
Precision = Literal["bf16", "fp32"]
ReconstructionMetric = Literal["rfid", "psnr", "ssim", "lpips"]


def check_layers(text: str) -> str:
    """Refuse anything but "last" or "sum:4"."""
    if not re.fullmatch(r"last|sum:[1-9][0-9]*", text):
        raise ValueError('it reads "last", or "sum:K" for the last K blocks, e.g. "sum:4"')
    return text


class EncoderSpec(Spec):
    """A frozen encoder, told so fully that another machine can check it has the same one. App. E.1.

    `loader` says how the module is made: `timm` builds `architecture` by timm's name; `folder` reads a Hugging Face
    `config.json` at `path`; `pixels` has no weights; `diffusers` reads an AutoencoderKL's folder at `path`. `weights`
    is the file read, `weights_sha256` its digest.
    """

    name: str  # as the user wrote it: dinov2-b, timm:NAME, a folder, pixels, sdvae:FOLDER
    family: Literal["dinov2", "dinov3", "siglip", "mae", "timm", "pixels", "vae"]
    loader: Literal["timm", "folder", "pixels", "diffusers"]
    architecture: str  # timm's model name, the folder's model_type, the diffusers class
    path: str | None = None  # the folder
    weights: str | None = None
    weights_sha256: str | None = None
    input_size: Count  # pixels a side that the encoder sees: 224 for DINOv2 on 256-pixel images
    patch_size: Count  # pixels a side for one position of the latents: 1 for pixels, 8 for SD-VAE
    width: Count  # channels of a token
    prefix_tokens: int  # class and register tokens in front, dropped
    norm_eps: Positive | None  # of the last LayerNorm, which keeps no affine; None: no transformer, no LayerNorm
    position_antialias: bool = True  # of the bicubic resampling of position embeddings
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layers: Annotated[str, AfterValidator(check_layers)] = "last"  # sum:K adds up the last K blocks' tokens
    scaling_factor: Positive | None = None  # of an AutoencoderKL: latents = (posterior mean - shift) x scaling
    shift_factor: float | None = None  # likewise

    @property
    def tokens_side(self) -> int:
        """Tokens along one side: input_size / patch_size."""
        return self.input_size // self.patch_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, H, W of one image's latents."""
        return (self.width, self.tokens_side, self.tokens_side)

    @property
    def has_decoder(self) -> bool:
        """Whether latents turn into images without a trained decoder: the baselines of Tables 2, 10 and 11."""
        return self.loader in ("pixels", "diffusers")


class DecoderSpec(Spec):
    """ViT decoder from a latent map to pixels. App. E.2; sizes of Table 1b."""

    width: Count
    depth: Count
    heads: Count
    mlp_width: Count
    patch_size: Count  # p_d; pixels a side per token. Unequal to the encoder's share: decoder upsampling, Table 9

    @model_validator(mode="after")
    def check_width(self) -> Self:
        """Heads share the width; the positions' sines and cosines of rows and columns take it in fours."""
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} is to be a multiple of heads {self.heads} and of 4")
        return self


class DiffusionModelSpec(Spec):
    """DiT, or DiT with a wide shallow DDT head. Sec. 5, Table 13."""

    kind: Literal["dit", "dit_dh"]
    width: Count
    depth: Count
    heads: Count
    head_width: Count | None = None
    head_depth: Count | None = None
    head_heads: Count | None = None
    patch_size: Count = 1
    mlp_ratio: float = Field(default=4.0, ge=0.25, le=64.0)
    in_channels: Count | None = None  # None: the cache's
    input_size: Count | None = None  # latent side; None: the cache's
    class_conditional: bool = True  # False: the null label alone, App. K
    num_classes: int | None = None  # None: the cache's

    @model_validator(mode="after")
    def check_head(self) -> Self:
        """A DDT head is told in full for dit_dh, and not at all for dit."""
        told = [self.head_width, self.head_depth, self.head_heads]
        if self.kind == "dit_dh" and None in told:
            raise ValueError("kind dit_dh needs head_width, head_depth and head_heads")
        if self.kind == "dit" and any(value is not None for value in told):
            raise ValueError("kind dit has no head: remove head_width, head_depth and head_heads, or use kind dit_dh")
        for width, heads, name in ((self.width, self.heads, ""), (self.head_width, self.head_heads, "head_")):
            if width and heads and width % (heads * 4):
                raise ValueError(
                    f"{name}width {width} / {name}heads {heads}: 2-D RoPE needs a multiple of 4 channels a head"
                )
        return self


class FlowSpec(Spec):
    """Rectified flow between latents (t=0) and noise (t=1). Sec. 4 and 4.2."""

    time_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    time_mean: float = 0.0  # of logit(t), before the shift
    time_std: Positive = 1.0
    time_max: Positive = 1.0  # the paper trains on [0, 1]; the release truncates at 0.999
    time_shift_dim: Count | None = None  # m; None: tokens x channels of the cache
    time_shift_base: Count = 4096  # n

    @model_validator(mode="after")
    def check_time_max(self) -> Self:
        """Time lies in [0, 1]."""
        if self.time_max > 1:
            raise ValueError("time_max is at most 1")
        return self

    @property
    def time_shift(self) -> float:
        """alpha = sqrt(m / n): 6.93 for 256 tokens of 768 channels."""
        if self.time_shift_dim is None:
            raise ValueError("time_shift_dim is not resolved against a cache yet")
        return math.sqrt(self.time_shift_dim / self.time_shift_base)


class OptimizerSpec(Spec):
    """AdamW. App. F for diffusion, Table 12 for decoders."""

    learning_rate: Positive
    betas: tuple[Probability, Probability]
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = None  # None: gradients are not clipped

    @model_validator(mode="after")
    def check_betas(self) -> Self:
        """Averages that forget nothing are none."""
        if max(self.betas) >= 1:
            raise ValueError("betas are below 1")
        return self


class ScheduleSpec(Spec):
    """Learning rate over a run: linear warm-up, then a hold at the maximum, then the decay to its end."""

    kind: Literal["constant", "linear", "cosine"]
    warmup: Duration = "0 steps"
    hold: Duration = "0 steps"  # at the maximum, after the warm-up
    final_learning_rate: NonNegative | None = None

    @model_validator(mode="after")
    def check_final(self) -> Self:
        """A decay has an end; a constant has none."""
        if (self.kind == "constant") != (self.final_learning_rate is None):
            raise ValueError("final_learning_rate is needed by linear and cosine, and by them alone")
        return self


class ReconstructionLossSpec(Spec):
    """L1 plus a perceptual term, on images in [0, 1]. App. E.2.

    `lpips` is LPIPS with VGG; `features` is the mean squared distance in the layers of a classifier of yours.
    """

    l1_weight: NonNegative = 1.0
    perceptual: Literal["lpips", "features", "none"]
    perceptual_weight: NonNegative = 1.0
    perceptual_weights: str | None = None  # a file: VGG16 for lpips, a classifier for features
    perceptual_start: Duration = "0 epochs"

    @model_validator(mode="after")
    def check_weights(self) -> Self:
        """A feature loss is nothing without its network."""
        if self.perceptual == "features" and not self.perceptual_weights:
            raise ValueError("perceptual: features needs perceptual_weights, the classifier's file")
        return self


class AdversarialSpec(Spec):
    """The adversarial term, from a frozen DINO ViT-S/8 with trained heads. App. E.2, Table 12.

    Where paper and release differ, both can be had: the norm of the heads, the cutout of DiffAug, and where the
    gradients are taken whose norms balance the term: at the images (the paper) or the last layer (the release).
    """

    backbone: str | None = None  # a safetensors file of the frozen ViT; None: DINO ViT-S/8 of the Hugging Face cache
    discriminator_norm: Literal["batch", "instance"] = "batch"  # paper | release
    weight: NonNegative = 0.75
    balance: Literal["image", "last_layer"] = "image"  # paper | release: where lambda's gradients are taken
    cutout: Probability = 0.5  # side of DiffAug's square; the paper has the default, the release 0
    discriminator_start: Duration = "6 epochs"
    generator_start: Duration = "8 epochs"
    optimizer: OptimizerSpec  # the discriminator's
    schedule: ScheduleSpec  # from its first step to the run's end


class AugmentationSpec(Spec):
    """Crops of training images. App. E.2: resized to 384, then a random crop of 256."""

    resize: Count  # the shorter side, before the crop
    crop: Literal["random", "center"]
    horizontal_flip: bool = False


class ValidationSpec(Spec):
    """What a decoder in training is measured on: its averaged weights, without latent noise, on images not trained on.

    Training's own numbers do not depend on it.
    """

    images: str  # a folder or WebDataset tars
    every: Duration = "1 epochs"  # and at the end
    num: Count | None = None  # images, a fixed random choice; None: all
    batch_size: Count = 64  # images a forward on one rank, taken up to the next multiple of 16
    metrics: tuple[ReconstructionMetric, ...] | None = None  # None: psnr, ssim, and those whose weights are here
    lpips_weights: str | None = None  # torchvision's VGG16; None: torch hub's cache
    inception: str | None = None  # torch-fidelity's weights; None: $RAE_INCEPTION, torch hub's cache
    features: str | None = None  # for rfid instead of Inception: a classifier's file, an encoder's name or folder
    pictures: int = Field(default=32, ge=0)  # pairs in samples/step-0000100.png, from the first batch; 0: none

    @model_validator(mode="after")
    def check_every(self) -> Self:
        """Nothing is measured every 0 steps."""
        if float(self.every.split()[0]) == 0:
            raise ValueError("every is above 0: 1 epochs, 500 steps")
        return self


class TrackingSpec(Spec):
    """Where the figures of metrics.jsonl are told a second time."""

    tensorboard: bool = False  # event files in RUN/tensorboard; needs raecli[tensorboard]
    wandb_project: str | None = None  # needs your own wandb


class GenerationSpec(Spec):
    """Samples and FID of the averaged weights, while training goes on. Keys as the options of `rae sample` and `eval`.

    Without a reference there are pictures and no FID.
    """

    every: Duration  # and at the run's end
    num: int = Field(ge=1, le=100_000_000)  # images; a FID to be compared with others' takes 50000
    autoencoder: str | None = None  # a decoder run, its final/, a checkpoint; pixels; sdvae:FOLDER
    reference: str | None = None  # images, or an .npz of statistics
    features: str | None = None  # a classifier's file, for FID in its features; None: Inception
    inception: str | None = None  # Inception's weights; None: $RAE_INCEPTION, torch hub's cache
    seed: int = 0
    steps: Count = 50
    solver: Literal["euler", "heun"] = "euler"
    time_grid: Literal["paper", "released"] = "paper"
    guidance_scale: Positive = 1.0
    guidance_interval: tuple[Probability, Probability] = (0.0, 1.0)  # in shifted time, ends included
    batch_size: Count = 64  # images at once on a rank
    precision: Precision = "fp32"
    pixel_rounding: Literal["round", "floor"] = "round"
    grid: int = Field(default=64, ge=0)  # images on the sheet samples/step-0001000.png; 0: no sheet

    @model_validator(mode="after")
    def check_generation(self) -> Self:
        """Latents have no FID: it is a distance between images."""
        if self.autoencoder is None:
            raise ValueError(
                "autoencoder: missing; FID and sheets are of images, so latents need a decoder: set "
                "evaluation.autoencoder to a decoder run, pixels or sdvae:FOLDER, or leave the block evaluation out"
            )
        if float(self.every.split()[0]) == 0:
            raise ValueError("every is above 0: 10 epochs, 5000 steps")
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError("guidance_interval: its first number is above its second")
        if self.time_grid == "released" and self.steps < 2:
            raise ValueError("steps is at least 2 on the released time grid, which makes steps - 1")
        if self.reference is None and (self.features or self.inception):
            raise ValueError("reference: missing; features and inception are for a FID, which is to a reference")
        if self.reference is not None and self.num < 2:
            raise ValueError("num is at least 2 for a FID, and 50000 for one to be compared with others'")
        if self.features and self.inception:
            raise ValueError("inception and features exclude one another: FID is measured in one network")
        if self.reference is None and not self.grid:
            raise ValueError("reference: missing, and grid is 0: there is nothing to make images for")
        return self
