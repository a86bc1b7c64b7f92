# The extension that cffi builds from csrc/.
from memsafe_pool.native import _Library

lib: _Library
