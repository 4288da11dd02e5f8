"""`megachat build-kernels`: makes kernel libraries ahead of the runs, e.g. on a login node."""

from pathlib import Path
from typing import Annotated

import typer

from megachat.errors import ConfigError


def build_kernels(
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH,...",
            help="CUDA kernels for these GPU architectures, in one library: sm_80 runs on A100, "
            "sm_90 on H100 and H200. Needs nvcc, no GPU.",
        ),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="CPU kernels for the processor of this machine.")
    ] = False,
    isa: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL,...",
            help="CPU kernels for other processors, one library a level: x86-64-v3 has AVX2, "
            "x86-64-v4 AVX-512.",
        ),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where to put them; default: where runs of this user look. Elsewhere built, they "
            "have to be copied there: ~/.cache/megachat/kernels.",
        ),
    ] = None,
) -> None:
    """Build kernel libraries ahead of the runs, which then need no compiler.

    A library that is there already is left as it is.
    """
    from megachat.ops.build import Recipe, build_ahead, library_folder
    from megachat.ops.targets import NATIVE, check_gpu, check_isa

    architectures, levels = _listed(arch), _listed(isa)
    for architecture in architectures:
        check_gpu(architecture)
    for level in levels:
        check_isa(level)
    cache = library_folder() if into is None else into
    recipes = [
        Recipe(cache=cache, targets=(target,)) for target in ([NATIVE] if cpu else []) + levels
    ]
    if architectures:
        recipes.append(Recipe.for_gpus(*architectures, cache=cache))
    if not recipes:
        raise ConfigError(
            "nothing to build: give --arch sm_80,sm_90 for GPUs, --cpu or --isa for processors"
        )
    for recipe in recipes:
        built = build_ahead(recipe)
        state = "was there" if built.seconds is None else f"built in {built.seconds:.1f} s"
        typer.echo(
            f"{recipe.toolchain.title} for {', '.join(recipe.targets)}: {state}, "
            f"{built.num_bytes / 1e6:.1f} MB, {built.path}"
        )


def _listed(text: str | None) -> list[str]:
    """The items of a list with commas, each once, sorted."""
    return sorted({item.strip() for item in (text or "").split(",") if item.strip()})
