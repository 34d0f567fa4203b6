"""What each stage is told: one recipe a stage, its first key `stage:`."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from raecli.recipe.blocks import (
    AdversarialSpec,
    AugmentationSpec,
    DecoderSpec,
    DiffusionModelSpec,
    Dtype,
    EncoderSpec,
    FlowSpec,
    GenerationSpec,
    OptimizerSpec,
    Precision,
    ReconstructionLossSpec,
    ReconstructionMetric,
    ScheduleSpec,
    TrackingSpec,
    ValidationSpec,
)
from raecli.recipe.spec import Count, Duration, NonNegative, Positive, Probability, Spec


class EncodeCacheRecipe(Spec):
    """Images to a latent cache."""

    stage: Literal["encode-cache"]
    encoder: EncoderSpec
    source: str
    output: str
    image_size: Count = 256
    views: Literal["center", "center+flip"] = "center"
    dtype: Dtype = "bf16"  # on disk
    precision: Precision = "bf16"  # of the encoder's matrix products
    samples_per_shard: Count = 2048
    batch_size: Count = 128
    seed: int = 0
    on_bad_image: Literal["fail", "skip"] = "fail"
    join: bool = False  # share the work with other jobs that make this very cache


class TrainingRecipe(Spec):
    """What the two training stages share."""

    paper: str  # the row of the paper that this file reproduces, or what it is instead
    cache: str
    output: str
    seed: int = 0
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    duration: Duration
    batch_size: Count  # global: micro_batch_size x accumulation x ranks
    micro_batch_size: Count | None = None  # images a forward on one rank; None: batch_size / ranks
    ema_decay: Probability
    ema_ramp: bool = False  # min(decay, (1 + step) / (10 + step)), for short runs
    precision: Precision = "bf16"
    compile: bool = False
    log_every: Count = 50
    tracking: TrackingSpec = TrackingSpec()
    peak_tflops: Positive | None = None  # of one device, for MFU; None: that of its data sheet, where it is known
    save_every: Duration = "1 epochs"
    keep_checkpoints: Count = 2

    @model_validator(mode="after")
    def check_save_every(self) -> Self:
        """Nothing is saved every 0 steps."""
        if float(self.save_every.split()[0]) == 0:
            raise ValueError("save_every is above 0: 1 epochs, 500 steps")
        return self


class TrainDecoderRecipe(TrainingRecipe):
    """Stage 1: a decoder from latents to pixels. Sec. 3, Sec. 4.3, App. E.2."""

    stage: Literal["train-decoder"]
    images: str  # a folder or WebDataset tars
    decoder: DecoderSpec
    augmentation: AugmentationSpec
    noise_tau: NonNegative  # tau of Sec. 4.3
    noise_sigma: Literal["halfnormal", "uniform"] = "halfnormal"  # paper | release
    latents: Literal["encoder", "cached"] = "encoder"  # of the crops as they come, or the cache's, of centre crops
    loss: ReconstructionLossSpec
    adversarial: AdversarialSpec | None = None  # None: no discriminator
    validation: ValidationSpec | None = None


class TrainDiffusionRecipe(TrainingRecipe):
    """Stage 2: a diffusion transformer on cached latents. Sec. 4, Sec. 5, App. F."""

    stage: Literal["train-diffusion"]
    model: DiffusionModelSpec
    flow: FlowSpec
    label_dropout: Probability = 0.1
    horizontal_flip: bool = True  # use the cache's flipped views, where it has them
    remote_cache_gb: Positive = 100.0  # room on this machine for shards of a cache at a URL
    shuffle: Literal["global", "block"] = "global"  # block: for cold disks, network storage and remote caches
    shuffle_block: Count = 2048  # samples that lie together and are read together; 16 such runs are mixed at a time
    parallel: Literal["ddp", "fsdp"] = "ddp"  # every rank has the whole state | each a share of it
    checkpoint_activations: bool = (
        False  # blocks compute theirs again in the backward pass: less memory, a third slower
    )
    evaluation: GenerationSpec | None = None


class SweepSpec(Spec):
    """Guidance scales and intervals to try, and what their samples are measured against. App. D: "we sweep"."""

    scales: tuple[Positive, ...] = Field(min_length=1, max_length=100)
    intervals: tuple[tuple[Probability, Probability], ...] = Field(
        default=((0.0, 1.0),), min_length=1, max_length=100
    )  # in shifted time, ends included
    reference: str  # as of `rae eval fid --ref`
    features: str | None = None  # a classifier's file, an encoder's name or folder, instead of Inception
    inception: str | None = None  # its weights; None: $RAE_INCEPTION, torch hub's cache
    print_json: bool = False

    @model_validator(mode="after")
    def check_intervals(self) -> Self:
        """Intervals have their ends in order; one network measures."""
        for low, high in self.intervals:
            if low > high:
                raise ValueError(f"interval {low}:{high}: its first number is above its second")
        if self.features and self.inception:
            raise ValueError("features and inception exclude one another: FID is measured in one network")
        return self


class SampleRecipe(Spec):
    """Noise to images. App. D and F."""

    stage: Literal["sample"]
    paper: str = "none: options of the command line"  # the row that a recipe file reproduces, or what it is instead
    model: str
    autoencoder: str
    output: str
    num: int = Field(default=64, ge=1, le=1_000_000)  # six digits: names sort as numbers do
    seed: int = 0
    steps: Count = 50
    solver: Literal["euler", "heun", "sde"] = "euler"
    sde_diffusion: NonNegative = 1.0  # w_t = sde_diffusion x t of solver sde; 0: the ODE. App. I
    time_grid: Literal["paper", "released"] = "paper"
    guidance_scale: Positive = 1.0
    guidance_interval: tuple[Probability, Probability] = (0.0, 1.0)  # in shifted time, ends included
    guide: str | None = None  # the weaker model of AutoGuidance; None: classifier-free guidance
    classes: tuple[int | str, ...] | None = None  # numbers or names; None: all of them
    unconditional: bool = False  # the null label alone, whatever classes the model knows. App. K
    batch_size: Count = 64
    precision: Precision = "fp32"
    compile: bool = False  # a block at a time
    format: Literal["png", "npz", "both"] = "png"
    pixel_rounding: Literal["round", "floor"] = "round"
    grid: int = Field(default=100, ge=0, le=10_000)  # images in grid.png; 0: none
    trajectory: int = Field(default=0, ge=0, le=100)  # images in trajectory.png; 0: none
    sweep: SweepSpec | None = None  # None: one set of samples

    @model_validator(mode="after")
    def check_interval(self) -> Self:
        """The interval has its ends in order, and there is a step to make."""
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError("guidance_interval: its first number is above its second")
        if self.time_grid == "released" and self.steps < 2:
            raise ValueError("steps is at least 2 on the released time grid, which makes steps - 1")
        return self

    @model_validator(mode="after")
    def check_labels(self) -> Self:
        """One way to choose labels; and guidance has something to steer by."""
        if self.unconditional and self.classes is not None:
            raise ValueError("unconditional leaves the classes out: give one of unconditional and classes")
        if self.classes == ():
            raise ValueError("classes: give one at least, or leave it out for all of them")
        scales = (self.guidance_scale, *(self.sweep.scales if self.sweep else ()))
        if self.unconditional and self.guide is None and any(scale != 1 for scale in scales):
            raise ValueError("unconditional samples have no label to guide by: give guide, a weaker model (App. K)")
        return self


class ReconstructRecipe(Spec):
    """Images through an autoencoder and back."""

    stage: Literal["reconstruct"]
    source: str
    output: str
    autoencoder: str
    image_size: Count | None = None  # of pixels and sdvae:FOLDER; None: 256. A trained autoencoder has its own
    batch_size: Count = 64
    precision: Precision = "fp32"
    pixel_rounding: Literal["round", "floor"] = "round"
    save_originals: bool = False
    sheet: int = Field(default=32, ge=0)  # pairs in sheet.png; 0: none


class EvaluateReconstructionRecipe(Spec):
    """Images and their reconstructions to figures."""

    stage: Literal["evaluate-reconstruction"]
    images: str
    reconstructions: str
    metrics: tuple[ReconstructionMetric, ...] = Field(min_length=1)
    lpips_weights: str | None = None  # torchvision's VGG16
    inception: str | None = None  # torch-fidelity's Inception weights
    features: str | None = None  # a feature network of the user's, instead of Inception
    batch_size: Count = 64
    print_json: bool = False
    output: str | None = None


class EvaluateRecipe(Spec):
    """Samples and a reference to figures; or, with `write`, images to features or statistics."""

    stage: Literal["eval"]
    metrics: tuple[Literal["fid", "sfid", "is", "precision-recall", "kid", "fdd", "accuracy"], ...]
    optional: bool = False  # say of a metric that cannot be had why, instead of ending
    write: Literal["features", "statistics"] | None = None  # to `output`
    kind: Literal["generation", "reconstruction"] = "generation"  # what statistics or features are a reference for
    samples: str
    reference: str | None = None
    inception: str | None = None  # torch-fidelity's Inception weights
    dinov2: str | None = None  # of ViT-L/14 without registers, for fdd
    features: str | None = None  # a feature network of the user's, instead of Inception
    classifier: str | None = None  # for accuracy
    pr_precision: Literal["both", "exact", "adm"] = "both"  # distances of precision and recall: float32, float16
    batch_size: Count = 64
    print_json: bool = False
    output: str | None = None


class OverfitToyRecipe(Spec):
    """Theorem 1 on one latent: a loss for each width, beside its bound. Sec. 4.1, App. G.

    The latents: of `images` by the autoencoder, else by the encoder, else by a vision transformer of DINOv2's layout
    and random weights; with no images, tokens drawn at random.
    """

    stage: Literal["overfit-toy"]
    preset: Literal["tiny", "small", "paper-cpu", "paper"]
    widths: tuple[Count, ...] = Field(min_length=1)  # of the DiT, or of the backbone where there is a head
    depths: tuple[Count, ...] = Field(min_length=1)
    heads: Count | None = None  # attention heads at most; None: width / 64, at least 1
    head: tuple[Count, Count] | None = None  # DDT head: width, depth
    channels: tuple[Count, ...] = Field(min_length=1)  # n, of each model to be held against each width
    tokens: Count  # N, a square number
    images: tuple[str, ...] = ()  # each is overfitted by models of its own
    image_size: Count = 56  # pixels a side of an image's centre crop
    encoder: EncoderSpec | None = None
    autoencoder: str | None = None  # encodes, and decodes what was generated
    batch_size: Count
    steps: Count
    learning_rate: Positive
    final_learning_rate: NonNegative | None  # None: constant
    time_shift: Positive
    evaluation_draws: int = Field(ge=2)  # of (t, noise), for the mean and its standard error
    sample_steps: Count  # of Euler
    seeds: tuple[int, ...] = Field(min_length=1)  # each has its own weights and noise, and its own random encoder
    grid: bool = False  # end with a table of width against channels: Table 3
    output: str
    print_json: bool = False  # the report on stdout, the table on stderr

    @model_validator(mode="after")
    def check_sizes(self) -> Self:
        """Positions of a map want a square of tokens, and channels in fours."""
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"tokens is {self.tokens}; a map needs a square number: 1, 4, 9, 16 ...")
        for width in [*self.widths, *(self.head or ())[:1]]:
            if width % 4:
                raise ValueError(
                    f"width {width} is no multiple of 4, which 2-D positions need: try {width + 4 - width % 4}"
                )
        return self


RECIPES: dict[str, type[Spec]] = {
    "encode-cache": EncodeCacheRecipe,
    "train-decoder": TrainDecoderRecipe,
    "train-diffusion": TrainDiffusionRecipe,
    "sample": SampleRecipe,
    "reconstruct": ReconstructRecipe,
    "eval": EvaluateRecipe,
    "evaluate-reconstruction": EvaluateReconstructionRecipe,
    "overfit-toy": OverfitToyRecipe,
}
