"""Packaging of megachat: what is installed, what it needs, and the `megachat` command.

Every direct dependency is pinned: a training run must be repeatable next year. The three at the top
are also pinned because megachat relies on their internals (`parallel/cpu_compat.py`,
`training/zero1.py`), so moving one is a change to test and not a matter for the resolver.

Left out on purpose:
* transformer-engine and NVIDIA apex are optional accelerators, built from source and found at run
  time. PyPI's `apex` is an unrelated package, and `transformer-engine` without its compiled half
  breaks the import of megatron-core;
* torchvision and torchaudio are not needed and must not come in.
"""

from setuptools import find_packages, setup

RUNTIME = [
    "torch==2.13.0",
    "megatron-core==0.16.1",
    "deepspeed==0.19.8",
    "datasets==5.2.0",
    "filelock==4.3.1",
    "jinja2==3.1.6",
    "matplotlib==3.11.2",
    "numpy==2.4.6",
    "pydantic==2.14.3",
    "rich==15.0.0",
    "safetensors==0.8.0",
    "sentencepiece==0.2.3",
    "tensorboard==2.21.0",
    "tokenizers==0.23.3",
    "transformers==5.23.0",
    "typer==0.29.2",
]

DEMO = [  # the real conversations of the first command, and the judge of how upbeat a reply is
    "chitchat-dataset==0.9.0",
    "requests==2.34.2",  # vaderSentiment imports it
    "vaderSentiment==3.3.2",
]

TEST = [
    *DEMO,  # the end-to-end test runs the demo
    "hypothesis==6.170.15",
    "mypy==2.4.1",
    "nvidia-cuda-nvdisasm==13.5.37",  # reads what nvcc makes of the kernels, where there is nvcc
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",  # runs tests on two cores at once
    "ruff==0.17.6",
]

setup(
    name="megachat",
    version="0.1.0",
    description="Trains chat assistants from OPT models in the three InstructGPT steps",
    packages=find_packages(include=["megachat", "megachat.*"]),
    package_data={"megachat.telemetry": ["*.jinja"]},
    # 0.16.1 is the newest megatron-core that Python 3.11 can install (later ones ask for 3.12), and
    # 3.11 is the only version that the pinned set above has been run with.
    python_requires=">=3.11,<3.12",
    install_requires=RUNTIME,
    extras_require={"demo": DEMO, "test": TEST},
    entry_points={"console_scripts": ["megachat = megachat.cli.start:main"]},
    zip_safe=False,
)
