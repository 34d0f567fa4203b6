"""Names and shapes of the encoders that diffusers' AutoencoderRAE builds from its few sizes. diffusers 0.42.1."""

from raecli.convert.diffusers import MLP_WIDTH, POSITION_SIDES

Shapes = dict[str, tuple[int, ...]]
REGISTERS = 4


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    """Weight and bias."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    """Weight and bias of a LayerNorm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def encoder_shapes(family: str, *, width: int, depth: int, patch_size: int) -> Shapes:
    """Published names to shapes, the last LayerNorm left out as diffusers does."""
    grid = (POSITION_SIDES[family] // patch_size) ** 2
    patch = (width, 3, patch_size, patch_size)
    if family == "siglip":
        return siglip_shapes(width, depth, patch, grid)
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, grid + 1, width),
        "embeddings.patch_embeddings.projection.weight": patch,
        "embeddings.patch_embeddings.projection.bias": (width,),
    }
    if family == "dinov2":
        shapes |= {"embeddings.register_tokens": (1, REGISTERS, width), "embeddings.mask_token": (1, width)}
    for index in range(depth):
        shapes |= {f"encoder.layer.{index}.{name}": shape for name, shape in block_shapes(family, width).items()}
    return shapes


def block_shapes(family: str, width: int) -> Shapes:
    """A block of DINOv2 or MAE."""
    shapes: Shapes = {}
    for part in ("query", "key", "value"):
        shapes |= linear(f"attention.attention.{part}", width, width)
    shapes |= linear("attention.output.dense", width, width)
    if family == "mae":
        shapes |= norm("layernorm_before", width) | norm("layernorm_after", width)
        return shapes | linear("intermediate.dense", width, MLP_WIDTH) | linear("output.dense", MLP_WIDTH, width)
    shapes |= norm("norm1", width) | norm("norm2", width)
    shapes |= {"layer_scale1.lambda1": (width,), "layer_scale2.lambda1": (width,)}
    return shapes | linear("mlp.fc1", width, 4 * width) | linear("mlp.fc2", 4 * width, width)


def siglip_shapes(width: int, depth: int, patch: tuple[int, ...], grid: int) -> Shapes:
    """SigLIP's vision tower with its pooling head, which an autoencoder does not use."""
    shapes: Shapes = {
        "embeddings.patch_embedding.weight": patch,
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (grid, width),
        **siglip_head(width),
    }
    for index in range(depth):
        block = norm("layer_norm1", width) | norm("layer_norm2", width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            block |= linear(f"self_attn.{part}", width, width)
        block |= linear("mlp.fc1", width, MLP_WIDTH) | linear("mlp.fc2", MLP_WIDTH, width)
        shapes |= {f"encoder.layers.{index}.{name}": shape for name, shape in block.items()}
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def siglip_head(width: int) -> Shapes:
    """The pooling head."""
    shapes: Shapes = {
        "probe": (1, 1, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
        **linear("attention.out_proj", width, width),
        **norm("layernorm", width),
        **linear("mlp.fc1", width, MLP_WIDTH),
        **linear("mlp.fc2", MLP_WIDTH, width),
    }
    return {f"head.{name}": shape for name, shape in shapes.items()}


def is_unused(name: str) -> bool:
    """Whether an autoencoder never reads a tensor, so that zeros do where a file lacks it."""
    return name == "embeddings.mask_token" or name.startswith("vision_model.head.")
