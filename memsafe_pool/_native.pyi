# The extension that cffi builds from csrc/.
from typing import Any

from memsafe_pool.native import _Library

ffi: Any
lib: _Library
