"""Packaging of the_mask. Project metadata lives here; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent

# Lower bounds are versions that were really run (docs/install.md, "Versions tried").
REQUIREMENTS = [
    "torch>=2.9",
    "torchvision>=0.24",
    "fvcore>=0.1.5.post20221221",
    "iopath>=0.1.9",
    "yacs>=0.1.8",
    "pycocotools>=2.0.7",
    "timm>=1.0",
    "scipy>=1.11",
    "opencv-python-headless>=4.8",
    "ninja>=1.11",
    "numpy>=1.26",
    "pillow>=10.1",
    "av>=12.0",
    "tensorboard>=2.15",
    "tqdm>=4.66",
    "tabulate>=0.9",
    "termcolor>=2.3",
    "safetensors>=0.4",
    "cloudpickle>=2.2",
]
DEV_REQUIREMENTS = [
    "pytest>=9.0",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "mypy>=1.10",
    "transformers>=4.50",
]

setup(
    name="the_mask",
    version="0.1.0.dev0",
    description="Video semantic segmentation on Detectron2: THE-Mask, Mask2Former and their relatives",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["the_mask", "the_mask.*"]),
    package_data={"the_mask": ["py.typed", "data/categories/*.json"]},
    install_requires=REQUIREMENTS,
    extras_require={"dev": DEV_REQUIREMENTS},
    zip_safe=False,
)
