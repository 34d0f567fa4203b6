"""What a recipe would cost, for --dry-run and `rae flops`: parameters, FLOPs, memory, steps, bytes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raecli.errors import UsageError
from raecli.recipe.blocks import AdversarialSpec
from raecli.recipe.recipes import (
    EncodeCacheRecipe,
    ReconstructRecipe,
    SampleRecipe,
    TrainDecoderRecipe,
    TrainDiffusionRecipe,
    TrainingRecipe,
)
from raecli.recipe.spec import Spec, duration_in_steps
from raecli.store.manifest import read_manifest
from raecli.store.room import bytes_told

if TYPE_CHECKING:
    from raecli.models.flops import Macs

STATE_BYTES = 4 * 5  # a parameter's float32 weight, gradient, two Adam moments and average


def plan_lines(recipe: Spec) -> list[str]:
    """A few lines for a person, by stage."""
    if isinstance(recipe, EncodeCacheRecipe):
        return cache_lines(recipe)
    if isinstance(recipe, TrainDiffusionRecipe | TrainDecoderRecipe):
        return [*model_lines(recipe), *step_lines(recipe)]
    if isinstance(recipe, SampleRecipe):
        return sample_lines(recipe)
    if isinstance(recipe, ReconstructRecipe):
        from raecli.data.images import open_images

        return [f"{len(open_images(recipe.source).items)} images"]
    return []


def sample_lines(recipe: SampleRecipe) -> list[str]:
    """Images, and what each costs, where the models are there already."""
    from raecli.store.model_cards import is_there, read_autoencoder_card, read_diffusion_card

    end = "to t = 0" if recipe.time_grid == "paper" else "as released, ending short of t = 0"
    lines = [f"{recipe.num} images, {recipe.steps} steps of {recipe.solver} {end}, {recipe.precision}"]
    if recipe.sweep:
        lines[0] += f"; for each of scales {recipe.sweep.scales} in intervals {recipe.sweep.intervals}"
    if not all(is_there(path) for path in (recipe.model, recipe.autoencoder, recipe.guide) if path):
        return lines
    from raecli.sampling.cost import cost_lines

    model = read_diffusion_card(recipe.model)
    guide = read_diffusion_card(recipe.guide) if recipe.guide else None
    return [*lines, *cost_lines(recipe, model, guide, read_autoencoder_card(recipe.autoencoder, model))]


def cache_lines(recipe: EncodeCacheRecipe) -> list[str]:
    """Images and bytes of a cache."""
    from raecli.data.images import open_images
    from raecli.store.latent_cache import VIEWS
    from raecli.store.shards import ShardLayout

    count = len(open_images(recipe.source).items)
    encoder = recipe.encoder
    layout = ShardLayout(encoder.latent_shape, recipe.dtype, VIEWS[recipe.views])
    shards = -(-count // recipe.samples_per_shard)
    size = bytes_told(layout.shard_bytes(count))
    return [f"{count} images, latents {layout.latent_shape} in {recipe.dtype}, shards: {shards}, {size}"]


def model_lines(recipe: TrainDiffusionRecipe | TrainDecoderRecipe) -> list[str]:
    """Parameters of the model to train, and the memory of its state on a rank."""
    import torch

    from raecli.models.build import decoder_of, diffusion_of
    from raecli.models.dit import parameter_count

    if not Path(recipe.cache).exists():
        return [
            "parameters, memory and speed with DINOv2-B's sizes assumed: rae flops, with this recipe and its values"
        ]
    with torch.device("meta"):
        if isinstance(recipe, TrainDiffusionRecipe):
            count = parameter_count(diffusion_of(recipe.model))
        else:
            decoder = decoder_of(recipe.decoder, read_manifest(recipe.cache).encoder)
            count = sum(parameter.numel() for parameter in decoder.parameters())
    state = f"{count} parameters; {count * STATE_BYTES / 2**30:.2f} GiB a rank for weights, gradients, Adam and average"
    if isinstance(recipe, TrainDiffusionRecipe) or recipe.adversarial is None:
        return [state]
    cost = discriminator_cost(recipe.adversarial)
    return [
        state,
        f"discriminator: {cost['discriminator_parameters_trained']} parameters trained, "
        f"{cost['discriminator_parameters_frozen']} frozen; "
        f"{cost['discriminator_executed_gflop_forward']:.2f} GFLOP a forward of one image",
    ]


def step_lines(recipe: TrainingRecipe) -> list[str]:
    """Optimiser steps and images seen."""
    if not Path(recipe.cache).exists():
        return [f"{recipe.duration}, {recipe.batch_size} images a step"]
    samples = read_manifest(recipe.cache).samples
    if isinstance(recipe, TrainDecoderRecipe):
        from raecli.data.images import open_images

        samples = len(open_images(recipe.images).items)
    steps = duration_in_steps(recipe.duration, samples, recipe.batch_size)
    seen = steps * recipe.batch_size
    told = f"{steps} steps of {recipe.batch_size} images: {seen} out of {samples}, {seen / samples:.1f} epochs"
    if recipe.batch_size <= samples:
        return [told]
    return [told, f"a step takes more images than the {samples} there are: a smaller batch_size gives more steps"]


ASSUMED = {"in_channels": 768, "input_size": 16, "num_classes": 1000}  # DINOv2-B at 256 pixels on ImageNet


def cost_of(recipe: Spec, peak_tflops: float) -> dict[str, Any]:
    """What a training recipe's model costs, by name: counts, GFLOP, GiB, images a second at best."""
    if isinstance(recipe, TrainDiffusionRecipe):
        return diffusion_cost(recipe, peak_tflops)
    if isinstance(recipe, TrainDecoderRecipe):
        return decoder_cost(recipe, peak_tflops)
    stage = recipe.to_dict()["stage"]
    raise UsageError(
        f"flops are counted for train-diffusion and train-decoder recipes, and this one is for {stage}; "
        "--dry-run of rae sample tells an image's"
    )


def diffusion_cost(recipe: TrainDiffusionRecipe, peak_tflops: float) -> dict[str, Any]:
    """A DiT's or DiT-DH's. Tables 15 and 18."""
    import torch

    from raecli.models.build import diffusion_of
    from raecli.models.dit import parameter_count
    from raecli.models.flops import diffusion_macs

    sizes, note = dict(ASSUMED), "assumed: no cache at " + recipe.cache
    if Path(recipe.cache).exists():
        manifest = read_manifest(recipe.cache)
        channels, side, _ = manifest.latent_shape
        sizes, note = {"in_channels": channels, "input_size": side, "num_classes": len(manifest.classes)}, recipe.cache
    told = {name: getattr(recipe.model, name) or value for name, value in sizes.items()}
    model = recipe.model.model_copy(update=told)
    with torch.device("meta"):
        count = parameter_count(diffusion_of(model))
    keys = ("in_channels", "input_size", "patch_size", "width", "depth", "head_width", "head_depth", "mlp_ratio")
    macs = diffusion_macs(**{key: getattr(model, key) for key in keys})
    latent_bytes = 2 * model.in_channels * model.input_size**2 if model.in_channels and model.input_size else 0
    bound = peak_tflops * 1e12 / (3 * 2 * macs.executed)
    return {
        "sizes": f"{told['in_channels']} x {told['input_size']} x {told['input_size']} ({note})",
        **shared_cost(count, macs, bound),
        "latents_gb_per_second_at_that_bound": bound * latent_bytes / 1e9,
    }


def decoder_cost(recipe: TrainDecoderRecipe, peak_tflops: float) -> dict[str, Any]:
    """A decoder's, and its encoder's where the cache is there. Tables 1b and 18."""
    import torch

    from raecli.models.decoder import Decoder
    from raecli.models.flops import decoder_macs

    channels, side, note = ASSUMED["in_channels"], ASSUMED["input_size"], "assumed: no cache at " + recipe.cache
    if Path(recipe.cache).exists():
        (channels, side, _), note = read_manifest(recipe.cache).latent_shape, recipe.cache
    sizes = {"in_channels": channels, "tokens_side": side, **recipe.decoder.model_dump(exclude={"heads"})}
    with torch.device("meta"):
        decoder = Decoder(heads=recipe.decoder.heads, **sizes)
        count = sum(tensor.numel() for tensor in [*decoder.parameters(), *decoder.buffers()])
    macs = decoder_macs(**sizes)
    bound = peak_tflops * 1e12 / (3 * 2 * macs.executed)
    cost = {"sizes": f"{channels} x {side} x {side} ({note})", **shared_cost(count, macs, bound)}
    return cost | (discriminator_cost(recipe.adversarial) if recipe.adversarial else {})


def discriminator_cost(spec: AdversarialSpec) -> dict[str, Any]:
    """A discriminator's: of DINO ViT-S/8 unless another backbone's file is there. FACTS section 4."""
    import torch

    from raecli.models.discriminator import KERNEL, Backbone, Discriminator, load_backbone, transformer
    from raecli.models.discriminator_file import find_backbone
    from raecli.models.flops import discriminator_macs

    there = spec.backbone is not None and Path(spec.backbone).is_file()
    with torch.device("meta"):
        backbone = load_backbone(find_backbone(spec.backbone)) if there else Backbone(transformer())
        discriminator = Discriminator(backbone, norm=spec.discriminator_norm)
    network = backbone.network
    macs = discriminator_macs(
        tokens_side=network.patch_embed.grid_size[0],
        patch_size=network.patch_embed.patch_size[0],
        width=network.embed_dim,
        depth=len(network.blocks),
        heads=len(discriminator.heads),
        kernel=KERNEL,
    )
    return {
        "discriminator_parameters_trained": sum(tensor.numel() for tensor in discriminator.heads.parameters()),
        "discriminator_parameters_frozen": sum(tensor.numel() for tensor in backbone.parameters()),
        "discriminator_paper_gflops": macs.paper / 1e9,
        "discriminator_executed_gflop_forward": 2 * macs.executed / 1e9,
    }


def shared_cost(parameters: int, macs: "Macs", bound: float) -> dict[str, Any]:
    """The figures that every model has."""
    return {
        "parameters": parameters,
        "paper_gflops": macs.paper / 1e9,  # multiply-adds
        "executed_gflop_forward": 2 * macs.executed / 1e9,
        "executed_gflop_training": 6 * macs.executed / 1e9,  # a backward is two forwards
        "state_gib_a_rank": parameters * STATE_BYTES / 2**30,
        "training_images_per_second_at_peak": bound,
        "inference_images_per_second_at_peak": 3 * bound,
    }
