"""The one place where random streams get their seeds: named, stable, independent of the layout.

A stream is identified by what it is for (`seed_for(run_seed, "init", name)`), never by how many
numbers were drawn before, so adding a consumer or moving a layer to another rank changes nothing
else.
"""

import hashlib

import torch


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and its position, equal on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded with `seed_for(*parts)`."""
    return torch.Generator(device=device).manual_seed(seed_for(*parts))
