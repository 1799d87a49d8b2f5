from setuptools import find_packages, setup

TRAIN = [
    "jsonargparse[signatures]>=4.49",
    "tensorboard>=2.16",
    "tokenizers>=0.20",
    "tqdm>=4.66",
]

DATA = ["datasets>=3"]  # Hugging Face datasets as training data

HUGGINGFACE = ["transformers>=5.17,<6"]

BENCH = ["matplotlib>=3.8", "tqdm>=4.66"]

EXPLAIN = ["captum>=0.8", "matplotlib>=3.8"]

LAB = ["jinja2>=3.1", "pyyaml>=6"]

PRIVACY = ["opacus>=1.5"]

DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1"]

# What examples/ need together.
EXAMPLES = [*TRAIN, *EXPLAIN, *PRIVACY, "gguf>=0.19", "pyyaml>=6", "sacrebleu>=2.4"]

setup(
    name="fastgpt-triton",
    version="0.1.0",
    description="Fused Triton kernels that GPT models train and generate with",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    # kernels/ is fastgpt.kernels: in an install by package_dir, in the source tree by the link
    # fastgpt/kernels. It has no __init__.py: a top-level package `kernels` is Hugging Face's.
    packages=[*find_packages(include=["fastgpt", "fastgpt.*"]), "fastgpt.kernels"],
    package_dir={"fastgpt.kernels": "kernels"},
    package_data={
        "fastgpt": ["py.typed"],
        "fastgpt.lab": ["*.html", "*.css", "*.js"],
        "fastgpt.bench": ["*.html"],
        "fastgpt.interpret": ["*.html", "*.css", "*.js"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.10",  # the first that goes with triton 3.6
        "einops>=0.8",
        "numpy>=1.26",
        "safetensors>=0.4.5",
        "triton>=3.6; sys_platform == 'linux'",
    ],
    extras_require={
        "train": TRAIN,
        "data": [*TRAIN, *DATA],
        "bench": BENCH,
        "explain": [*TRAIN, *EXPLAIN],
        "lab": LAB,
        "huggingface": HUGGINGFACE,
        "privacy": PRIVACY,
        "examples": EXAMPLES,
        "docs": DOCS,
        "dev": [
            *TRAIN,
            *DATA,
            *BENCH,
            *LAB,
            *HUGGINGFACE,
            *EXAMPLES,
            *DOCS,
            "accelerate>=1.1",  # transformers' Trainer
            "expecttest>=0.2",  # torch.testing._internal, whose samples the tests run
            "gguf>=0.19",  # GGUF files, and the test that loads one
            "hqq>=0.2.8",  # transformers' quantised cache
            "hypothesis>=6.100",
            "liger-kernel>=0.8",  # a peer's kernels, for the lab
            "kernels>=0.17",  # beside which fastgpt.kernels must import
            "mypy>=1.15",
            "peft>=0.18",  # LoRA adapters in its layout are tested against it
            "playwright>=1.49",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["fastgpt=fastgpt.cli:main"]},
)
