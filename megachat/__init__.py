"""megachat: 3D-parallel RLHF training of OPT models, from one CPU laptop to 64 GPUs."""

__version__ = "0.1.0"
