"""`rae convert`: looks at what the source is, and hands it to the conversion that was asked for."""

from raecli.convert.diffusers import is_diffusers_folder
from raecli.convert.encoder import artifact_config
from raecli.convert.into_rae import (
    autoencoder_into_rae,
    decoder_into_rae,
    diffusion_into_rae,
    discriminator_into_rae,
    statistics_into_rae,
)
from raecli.convert.out_of_rae import (
    autoencoder_to_diffusers,
    autoencoder_with_encoder,
    decoder_to_release,
    diffusion_to_release,
    statistics_to_release,
)
from raecli.convert.output import Conversion, Report, new_output, refuse_existing, refuse_other_kind, refuse_own_source
from raecli.convert.settings import Request
from raecli.convert.source import kind_of, read_source
from raecli.errors import CheckpointError, UsageError
from raecli.store.room import check_writable

FORMATS = {"rae-diffusion": "diffusion", "rae-decoder": "decoder"}


def convert(request: Request) -> Report:
    """Convert; returns what was found and made. The output is whole or absent. A dry run checks, and writes nothing."""
    refuse_existing(request.output, request.force)
    refuse_own_source(request)
    conversion = prepared(request)
    refuse_other_kind(request.output, is_folder=conversion.is_folder)
    check_writable(request.output.parent, request.output)
    if not request.dry_run:
        with new_output(request.output, request.force, is_folder=conversion.is_folder) as scratch:
            conversion.write(scratch)
    return conversion.report


def prepared(request: Request) -> Conversion:
    """The source read, recognised and checked."""
    if request.to == "rae":
        return into_rae(request)
    if request.to == "diffusers":
        check_kind(request, own_kind(request), ("decoder", "autoencoder"))
        return autoencoder_to_diffusers(request)
    if request.kind == "statistics" or request.source.suffix == ".safetensors":
        return statistics_to_release(request)
    kind = own_kind(request)
    check_kind(request, kind, (kind, "autoencoder" if kind == "decoder" else kind))
    return diffusion_to_release(request) if kind == "diffusion" else decoder_to_release(request)


def into_rae(request: Request) -> Conversion:
    """Others' layouts to ours."""
    if request.source.is_dir():
        if artifact_config(request.source) is not None:
            return ours_to_ours(request)
        if not is_diffusers_folder(request.source):
            raise CheckpointError(f"{request.source}: a folder, but no diffusers AutoencoderRAE (config.json tells it)")
        check_kind(request, "autoencoder", ("autoencoder",))
        return autoencoder_into_rae(request)
    source = read_source(request.source)
    kind = kind_of(source.weights, source.path)
    check_kind(request, kind, (kind, "autoencoder" if kind == "decoder" else kind))
    ways = {
        "diffusion": diffusion_into_rae,
        "decoder": decoder_into_rae,
        "statistics": statistics_into_rae,
        "discriminator": discriminator_into_rae,
    }
    return ways[kind](request, source)


def ours_to_ours(request: Request) -> Conversion:
    """The one thing to be done with an artifact that is ours already: its encoder is put inside."""
    check_kind(request, own_kind(request), ("decoder", "autoencoder"))
    if request.kind != "autoencoder":
        raise UsageError(
            f"{request.source}: is an artifact of rae already; --to official and --to diffusers lead out of it, "
            "--kind autoencoder keeps its encoder inside"
        )
    return autoencoder_with_encoder(request)


def own_kind(request: Request) -> str:
    """What an artifact of ours is."""
    found = artifact_config(request.source)
    if found is None or found[1]["format"] not in FORMATS:
        raise CheckpointError(
            f"{request.source}: no artifact of rae (a run, its final/, a checkpoint, or a converted folder); "
            f"--to {request.to} starts from one"
        )
    return FORMATS[found[1]["format"]]


def check_kind(request: Request, found: str, fits: tuple[str, ...]) -> None:
    """Refuse what was called something that it is not."""
    if request.to == "diffusers" and found == "diffusion":
        raise UsageError(f"{request.source}: a diffusion model; diffusers has autoencoders alone: use --to official")
    if request.kind is not None and request.kind not in fits:
        raise CheckpointError(f"{request.source}: its keys are those of a {found}, not of a {request.kind}")
