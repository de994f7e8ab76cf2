"""What installs: `dapo`, and from kernels/ `dapo_kernels`. The folder kernels/ itself must never be
importable.
"""

from pathlib import Path

from setuptools import find_packages, setup

# Triton ≥ 3.7: the interpreter of older ones needs numpy < 2.4
TEST = ["pytest>=8", "pytest-xdist>=3.7", "hypothesis>=6.100", "triton>=3.7; sys_platform == 'linux'"]

setup(
    name="dapo-rl",  # PyPI's "dapo" is another project
    version="0.1.0",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    description="DAPO (arXiv:2503.14476) on Megatron-core: RL that teaches language models to reason",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    entry_points={"console_scripts": ["dapo = dapo.__main__:script"]},
    packages=[*find_packages(include=["dapo", "dapo.*"]), "dapo_kernels"],
    package_dir={"dapo_kernels": "kernels/dapo_kernels"},
    package_data={
        "dapo": ["py.typed", "report/page.html", "report/metrics.md", "model/refused.md"],
        "dapo_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11",
        # pinned: policy/cpu.py adapts this very version. Its metadata want Python 3.12, yet it runs on 3.11,
        # where the Makefile installs it
        "megatron-core==0.19.2; python_version >= '3.12'",
        "transformers>=5,<6",
        "tokenizers>=0.21",
        "numpy>=1.26",
        "safetensors>=0.5",
        "huggingface_hub>=1",
        "pyarrow>=23.0.1",  # CVE-2026-25087
        "isal>=1.7",  # CRC-32 five times as fast as zlib's
        "psutil>=5.9",  # without it torch_dist checkpoints hang while saving
        "tensorboard>=2.16",
        "rich>=13",
        "matplotlib>=3.8",
        "pydantic>=2.7",
        "pyyaml>=6",
        "aiohttp>=3.14.1",  # CVE-2026-22815 and others: an answer's memory
        "orjson>=3.11.6",  # CVE-2024-27454, CVE-2025-67221
        "mpmath>=1.3",  # answers that are no integers
    ],
    extras_require={
        # compiled against the torch that is there: pip install --no-build-isolation
        "gpu": ["transformer-engine[core_cu13,pytorch]==2.20.2", "triton"],
        "sglang": [
            "sglang==0.5.23",
            "sglang-router==0.3.2",
        ],  # those that the tests run: tests/sglang/environment/requirements.txt
        "wandb": ["wandb"],
        "trl": ["trl==1.16.0"],  # for benchmarks/loss_contenders.py
        "test": TEST,
        "dev": [*TEST, "ruff==0.17.6", "mypy==2.4.1", "types-PyYAML", "types-psutil"],
    },
)
