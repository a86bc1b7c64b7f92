"""A Celery worker pool whose children start on demand and give their memory back.

Select it with ``celery -A proj worker --pool memsafe_pool:Pool`` or with
``worker_pool = "memsafe_pool:Pool"`` in the configuration.

Importing this package is cheap on purpose: it is loaded by every ``celery``
command through the plug-in entry point, so what it offers is imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memsafe_pool.errors import MemoryLimitExceeded, SoftMemoryLimitExceeded
    from memsafe_pool.prefork import Pool

__all__ = ["MemoryLimitExceeded", "Pool", "SoftMemoryLimitExceeded", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Pool":
        from memsafe_pool.prefork import Pool

        return Pool
    if name in {"MemoryLimitExceeded", "SoftMemoryLimitExceeded"}:
        from memsafe_pool import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
