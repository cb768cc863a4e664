"""What goes wrong between a kernel's source and its first call."""


class BuildError(RuntimeError):
    """A library could not be built or loaded; the message says why and what to do."""
