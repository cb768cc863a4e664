"""The error of building or loading a kernel."""


class BuildError(RuntimeError):
    """A library could not be built or loaded; the message says why and what to do."""
