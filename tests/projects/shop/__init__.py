"""A project that is a package."""
