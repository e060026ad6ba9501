"""What the engine refuses, and why. Every message is one line that a person can act on."""


class EngineError(Exception):
    """The engine cannot do what was asked; its state is unchanged."""


class ModelError(EngineError):
    """A model folder cannot be loaded or run: missing, not safetensors, unsupported, or a draft of another
    vocabulary.
    """


class NoFreeSlotError(EngineError):
    """Every running slot is taken; preempt or drop a request first."""


class UnknownRequestError(EngineError):
    """The engine holds nothing under this request id."""


class InvalidRequestError(EngineError, ValueError):
    """A request breaks a rule; `field` names the offending field."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
