"""Types of the native codec: a layer's two messages, in a tenth of the time. The general codec is its plain twin."""

from wdmoe.transport.codec.messages import Message, Result, Run

def write(message: Message, version: int) -> bytes | None:
    """The frame of a Run or a Result, byte for byte as `wdmoe.transport.codec.framing.join` of `encode` makes it.

    Returns:
        None for any other message, and for one with anything unusual about it: the general codec must judge it.
    """
    ...

def read(frame: memoryview, version: int) -> Run | Result | None:
    """The Run or Result that a peer sent: what the general codec would read, and nothing that it would refuse.

    Args:
        frame: format "B", from an untrusted peer, no larger than its channel accepts.
        version: that it must have.
    Returns:
        None for any other message, and for one that is not as our own writers make it: the general codec must judge it.
        Small tensors are copies, large ones views of the frame where it is aligned.
    """
    ...
