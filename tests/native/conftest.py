"""Runs a piece of Python with the extension, and with its import blocked."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

#: A None there makes the import fail, as it does where nothing was built.
PRELUDE = {
    "extension": "from memsafe_pool import native\n",
    "ctypes": "import sys\nsys.modules['memsafe_pool._native'] = None\nfrom memsafe_pool import native\n",
}


@pytest.fixture(params=["extension", "ctypes"])
def run(request):
    """Run code in a process of its own, where `native` is imported; return what it prints, in lines.

    Keyword arguments are environment variables. `run.implementation` is the parameter.

    A process of its own, because what is tested belongs to the whole process, and could not be undone.
    """

    def run(code: str, **environment: str) -> list[str]:
        script = PRELUDE[request.param] + textwrap.dedent(code)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-X", "faulthandler", "-c", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stderr
        return done.stdout.splitlines()

    run.implementation = request.param
    return run
