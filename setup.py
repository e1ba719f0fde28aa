"""Build script: metadata lives in pyproject.toml; compiled parts are declared here as they land."""

from setuptools import setup

setup()
