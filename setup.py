"""Package discovery: `fm_longctx/kernels` is a symlink to `kernels/`, so namespace packages are listed by hand."""

from setuptools import find_namespace_packages, setup

setup(packages=find_namespace_packages(include=["fm_longctx*"]))
