# Metadata lives in pyproject.toml. This will drive the build of the native extension (csrc/); until
# there is one, it only hands over to setuptools.
from setuptools import setup

setup()
