"""Every error that pairtrace raises for something a caller can get wrong.

    PairtraceError (ValueError)
    |-- ConfigError                an option or argument is out of range or contradicts another
    |-- DataError                  the preference data, a prompt file or a rollouts file cannot be used
    |   |-- DataFormatError        a line, row or column is malformed
    |   `-- DataMismatchError      two inputs do not belong together (other data, other rows)
    |-- ModelError                 a checkpoint or tokenizer cannot be used
    |   |-- UnsupportedModelError  the architecture would come out wrong, so it is refused
    |   `-- LayerError             the layer is outside the model or not in the file
    |-- StoreError                 an activation store cannot be used
    |   |-- StoreMismatchError     the store was made from something else (expected, actual)
    |   |-- StoreSchemaError       the store has another schema version
    |   |-- StoreDamagedError      bytes are missing or differ from their checksum
    |   |-- StoreIncompleteError   rows are still missing
    |   |-- StoreLockedError       another process is writing
    |   `-- StoreWriteError        the disk is full or read-only
    |-- TrainingError              training cannot go on (loss or gradient not finite, wrong reference)
    |-- JudgeError                 the server of a judge cannot be reached, or refuses every question
    |-- EngineError                an inference engine (vLLM) does not start, or died
    |-- DirectionError             a direction has the wrong width, layer, model or values
    |-- ProbeError                 a probe cannot be trained or used (expected, actual)
    |   |-- ExamplesError          too few examples, one class only, not finite, labels that fit no rows
    |   `-- ProbeMismatchError     the probe belongs to another model, tokenizer, layer or width
    `-- MissingDependencyError     an optional package is not installed (the message names the command)

All are `ValueError`s, so callers that only know the built-in still catch them.
"""

from __future__ import annotations


class PairtraceError(ValueError):
    """Base class. The message says what was expected, what was found and what to do."""


class ConfigError(PairtraceError):
    """An option or argument is out of range or contradicts another."""


class DataError(PairtraceError):
    """Input data cannot be used."""


class DataFormatError(DataError):
    """A line, row or column of the input is malformed."""


class DataMismatchError(DataError):
    """Two inputs that must describe the same rows do not."""


class ModelError(PairtraceError):
    """A checkpoint or tokenizer cannot be used."""


class UnsupportedModelError(ModelError):
    """The architecture is refused because its activations would come out wrong."""


class LayerError(ModelError):
    """A layer is outside the model, or absent from a store or direction file."""


class StoreError(PairtraceError):
    """An activation store cannot be used."""


class StoreMismatchError(StoreError):
    """A store was made from something else.

    Attributes:
        field: the manifest field that differs.
        expected: the value that the caller needs.
        actual: the value that the store holds.
    """

    def __init__(self, field: str, expected: object, actual: object, advice: str) -> None:
        self.field = field
        self.expected = expected
        self.actual = actual
        self._advice = advice
        super().__init__(f"the store's {field} is {actual!r}, but {expected!r} is needed; {advice}")

    def __reduce__(self) -> tuple[type[StoreMismatchError], tuple[object, ...]]:
        # An exception is pickled with its message as its only argument.
        return type(self), (self.field, self.expected, self.actual, self._advice)


class StoreSchemaError(StoreError):
    """The store was written with another schema version."""


class StoreDamagedError(StoreError):
    """Bytes of a shard are missing, truncated, or differ from their checksum."""


class StoreIncompleteError(StoreError):
    """Rows of the store have not been computed yet."""


class StoreLockedError(StoreError):
    """Another process is writing to the store."""


class StoreWriteError(StoreError):
    """A shard could not be written (disk full, read-only, permission)."""


class TrainingError(PairtraceError):
    """Training cannot go on: the loss or the gradient is not finite, or the reference is not the model's own."""


class JudgeError(PairtraceError):
    """The server of a judge cannot be reached, or refuses every question."""


class EngineError(PairtraceError):
    """An inference engine does not start, or died during its work."""


class DirectionError(PairtraceError):
    """A direction has the wrong width, layer, model, or unusable values."""


class ProbeError(PairtraceError):
    """A probe cannot be trained or used.

    Attributes:
        expected: what is needed.
        actual: what there is.
    """

    def __init__(self, message: str, expected: object, actual: object) -> None:
        self.expected = expected
        self.actual = actual
        self._message = message
        super().__init__(f"{message}: expected {expected}, found {actual}")

    def __reduce__(self) -> tuple[type[ProbeError], tuple[object, ...]]:
        return type(self), (self._message, self.expected, self.actual)


class ExamplesError(ProbeError):
    """The examples of a probe are too few, of one class only, not finite, or their labels fit no rows."""


class ProbeMismatchError(ProbeError):
    """A probe belongs to another model, tokenizer, layer or width."""


class MissingDependencyError(PairtraceError):
    """An optional package is not installed.

    Args:
        package: its name; several are separated by spaces.
        extra: the extra of pairtrace that brings it; None for a package that no extra brings.
        purpose: what needs it.
    """

    def __init__(self, package: str, extra: str | None, purpose: str) -> None:
        self.package = package
        self._rest = (extra, purpose)
        command = f"pip install {package}" if extra is None else f"pip install 'pairtrace[{extra}]'"
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed; install it with: {command}")

    def __reduce__(self) -> tuple[type[MissingDependencyError], tuple[object, ...]]:
        return type(self), (self.package, *self._rest)
