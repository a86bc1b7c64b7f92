"""In the package."""

from witness import note

note("import module")
