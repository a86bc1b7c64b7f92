"""A package with a module to load before children are forked; each notes who imports it."""

from witness import note

note("import package")
