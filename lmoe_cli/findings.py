"""One thing a check has to say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from lmoe_cli.codes import CODES, Severity
from lmoe_cli.errors import LmoeError
from lmoe_cli.readable import MAX_TEXT, readable, shortened


@dataclass(frozen=True)
class Finding:
    """A problem or a remark, with the place it is about. Its texts are kept `readable`."""

    code: str
    """Key of `codes.CODES`; stable between versions."""
    severity: Severity
    where: str
    """File, expert or module that the finding is about."""
    message: str
    hint: str = ""
    """What to do next; empty when there is nothing to do."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", shortened(self.where, MAX_TEXT))
        object.__setattr__(self, "message", readable(self.message))
        object.__setattr__(self, "hint", readable(self.hint))

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def finding(code: str, where: str, message: str, hint: str = "") -> Finding:
    """Make a finding with the severity its code is registered with."""
    return Finding(code, CODES[code].severity, where, message, hint)


def from_error(error: LmoeError) -> Finding:
    """Tell an error as a finding, for machine-readable output and for checks that go on."""
    return Finding(error.code, "error", error.where, error.message, error.hint)


class RefusedError(LmoeError):
    """Findings that stop a command. All of them are shown, not only the first.

    Args:
        message: The verdict in one line.
        findings: What led to it, errors and lesser remarks alike.
        exit_code: 1 where sound parts do not fit, 2 where a file is wrong, 3 to 6 where something could not be read.
    """

    def __init__(self, message: str, findings: Iterable[Finding], *, exit_code: int = 1) -> None:
        super().__init__("refused", message)
        self.findings = tuple(findings)
        self.exit_code = exit_code


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that stop a command."""
    return [item for item in findings if item.severity == "error"]
