"""What pyproject.toml cannot say without a warning: the pool, which frugan goes without where it cannot be compiled."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("frugan.memory._pool", ["src/frugan/memory/pool.c"], optional=True)])
