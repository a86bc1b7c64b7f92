"""Everything is declared in pyproject.toml but what setuptools can only be told from Python."""

import sysconfig

from setuptools import setup

# One wheel for CPython 3.10 and later. A free-threaded interpreter has another ABI and gets its own wheel:
# there cffi leaves the limited API out by itself, and bdist_wheel refuses the tag.
LIMITED_API = (
    {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}}
)

setup(cffi_modules=["csrc/build_native.py:ffibuilder"], options=LIMITED_API)
