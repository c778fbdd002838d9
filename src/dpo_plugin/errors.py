"""The errors a user can meet. Each message says what was found, where, and ends with the line to write."""


class DPOPluginError(Exception):
    """Anything that dpo_plugin refuses to go on with."""


class ConfigError(DPOPluginError):
    """The YAML asks for something that does not exist, contradicts itself, or is not supported."""


class RegistrationError(DPOPluginError):
    """A third party's hook cannot be used: it does not import, is misspelled, or takes a name twice."""


class UnknownNameError(ConfigError):
    """The YAML names a format, strategy, loss or metric that nobody registered."""


class AdapterError(DPOPluginError):
    """An adapter cannot be read, does not fit the base model, or was not attached as it is on disk."""


class DataError(DPOPluginError):
    """The preference data cannot be read, or nothing usable is left of it."""


class RowError(DPOPluginError):
    """One row of the preference data cannot be used; the row is counted, not repaired.

    Attributes:
        reason: Under what the audit counts the row.
    """

    def __init__(self, message: str, reason: str = "malformed"):
        super().__init__(message)
        self.reason = reason


class TemplateError(DPOPluginError):
    """The chat template cannot say which tokens of a conversation are the completion."""


class CheckpointError(DPOPluginError):
    """A checkpoint is torn, not ours, or was made with another reference."""


class ReferenceMismatchError(DPOPluginError):
    """Policy and reference should be equal at step 0 and are not."""


class NotFiniteError(DPOPluginError):
    """A log-probability is NaN or infinite; names step, row and source."""


class RankMismatchError(DPOPluginError):
    """The processes of a distributed run are about to do different things."""


class HealthError(DPOPluginError):
    """A health check whose action is ``stop`` has found something."""
