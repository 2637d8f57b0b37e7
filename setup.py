"""Maps the top folders to packages of `zoo`. The links in zoo/ serve the source tree; a wheel never relies on them."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("architectures", "conversion", "evals", "kernels")
PACKAGES = {"zoo": "zoo", "zoo.commands": "zoo/commands", "zoo.model_cards": "model_cards"}

for folder in FOLDERS:
    PACKAGES[f"zoo.{folder}"] = folder
    for name in find_namespace_packages(folder, exclude=["*__pycache__*"]):
        PACKAGES[f"zoo.{folder}.{name}"] = f"{folder}/{name.replace('.', '/')}"

setup(packages=list(PACKAGES), package_dir=PACKAGES)
