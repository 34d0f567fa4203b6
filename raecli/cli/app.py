"""All verbs of `rae`. Nothing here or in a verb's file imports torch or pydantic before it has work to do."""

from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core

from raecli import __version__
from raecli.cli.options import CONTEXT, Verb, list_whole_sentences

VERBS = {  # each by its file in this folder, and its command or group of commands there
    "encode-cache": ("encode_cache", "encode_cache"),
    "train-decoder": ("train", "train_decoder"),
    "train-diffusion": ("train", "train_diffusion"),
    "sample": ("sample", "sample"),
    "eval": ("evaluate", "app"),
    "overfit-toy": ("overfit_toy", "overfit_toy"),
    "reconstruct": ("reconstruct", "reconstruct"),
    "recipes": ("recipes", "app"),
    "inspect": ("inspect", "inspect"),
    "verify": ("verify", "verify"),
    "plot": ("plot", "plot"),
    "report": ("report", "report"),
    "flops": ("flops", "flops"),
    "doctor": ("doctor", "doctor"),
    "fetch": ("fetch", "fetch"),
    "convert": ("convert", "convert"),
}


class InOrder(typer.core.TyperGroup):
    """Lists verbs as above, the six stages first; typer would put groups of commands last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All verbs that this command line has."""
        return [verb for verb in VERBS if verb in self.commands]


def command_line(words: Iterable[str] = ()) -> typer.Typer:
    """The command line for these words: with the one verb they name alone, which saves 30 ms; else with all verbs."""
    named = next((word for word in words if not word.startswith("-")), None)
    app = typer.Typer(
        name="rae",
        cls=InOrder,
        help="Representation Autoencoders, and the diffusion transformers trained on them.\n\n"
        "images -> encode-cache -> train-decoder, train-diffusion -> sample -> eval\n\n"
        "Examples:\n\n"
        "  rae encode-cache --encoder dinov2-b imagenet/ latents/\n\n"
        "  rae train-diffusion dith_xl --dry-run\n\n"
        "  rae eval fid samples/ --ref adm_ref.npz\n\n"
        "  rae overfit-toy --width 384..896\n\n"
        "`rae VERB --help` has more; `rae recipes ls` lists the recipes. The same command again resumes.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=CONTEXT,
    )
    app.callback()(root)
    for verb in [named] if named in VERBS else VERBS:
        file, name = VERBS[verb]
        found = getattr(import_module(f"raecli.cli.{file}"), name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=verb)
        else:
            app.command(verb, cls=Verb)(found)
    list_whole_sentences(app)
    return app


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"rae {__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the verb."""
