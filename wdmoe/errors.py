"""The failures wdmoe can state. Each message is one line: what was wrong, and what would be right."""


class WdmoeError(Exception):
    """A failure a user can act on. The command line prints it without a traceback and exits with 1."""


class ConfigError(WdmoeError):
    """A flag, file or setting has a value that cannot be used."""


class MissingExtraError(WdmoeError):
    """A command needs an optional part of the installation."""


class BundleError(WdmoeError):
    """A model folder or bundle is unreadable, incomplete, tampered with, or of a kind that is not supported."""


class UnsupportedModelError(BundleError):
    """A model that an engine has no graphs for; another engine may serve it."""


class ProtocolError(WdmoeError):
    """A frame that a correct peer would not send. Never trusted, never fatal to the node."""


class VersionError(ProtocolError):
    """A peer that speaks another protocol version."""


class TransportError(WdmoeError):
    """A socket cannot be opened, or a message cannot be handed to a peer."""


class PeerGoneError(TransportError):
    """The peer is not connected (any more); resend elsewhere."""


class PeerBusyError(TransportError):
    """The peer's queue is full; resend elsewhere or later."""


class RefusedError(WdmoeError):
    """The other side refused this node: its key, its token or its version."""


class ExpertError(WdmoeError):
    """An expert cannot be loaded or run."""


class ExpertsUnavailableError(WdmoeError):
    """A layer has no expert left to answer a token."""


class NotFiniteError(WdmoeError):
    """The model's own output is NaN or infinite: nothing can be made of it."""


class EngineLostError(WdmoeError):
    """The process that holds the model ended, and no other one took over in time; try again later."""


class RequestError(WdmoeError):
    """A generation request that cannot be served as asked."""


class OverloadedError(WdmoeError):
    """The base station has as many requests as it may hold; try again later."""


class CancelledRequestError(WdmoeError):
    """The client went away; its work was stopped."""
