from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="hf_tokenmixup",
    version="0.1.0",
    description="TokenMixup (NeurIPS 2022) for Hugging Face Transformers: saliency mixup inside vision transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"hf_tokenmixup.hub": ["templates/*.md"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "transformers>=5.9,<6",
        "datasets>=4.0,<6",
        "accelerate>=1.10,<2",
        "evaluate>=0.4.5,<0.5",
        "huggingface-hub>=1.5,<3",
        "scipy>=1.13",
        "timm>=1.0.20,<2",
        "scikit-learn>=1.5",
        "matplotlib>=3.9",
        "pillow>=10.4",
        "pyyaml>=6.0.1",
        "jinja2>=3.1",
    ],
    extras_require={
        "lora": ["peft>=0.20"],
        "dev": ["hypothesis>=6.100", "pytest>=8", "ruff>=0.14,<0.18", "peft>=0.20"],
    },
)
