"""What can go wrong, as types: one root, one subclass for each party that can act on it."""


class LoboError(Exception):
    """Root of every error this package raises on purpose."""


class InvalidInput(LoboError, ValueError):
    """The caller passed something that can't work: a setting, a name, a tensor, data or a path."""


class TraceError(LoboError):
    """`torch.export` could not capture the model; the message shows the user's own line."""


class ContractError(LoboError):
    """A pass broke its promise; the message names the pass, the node and the user's module."""


class ExportError(LoboError):
    """The program could not be written faithfully in the target format; no file was left."""
