"""What a check of a folder found, as data."""

from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One observation.

    Attributes:
        severity: "error" fails the check, "warning" should be looked at, "note" is information.
        file: What it is about, relative to the folder; "" for the folder.
        message: One line.
    """

    severity: Severity
    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.file + ': ' if self.file else ''}{self.message}"


@dataclass(frozen=True)
class Report:
    """All findings about a folder, errors first."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    @property
    def errors(self) -> list[Finding]:
        """The findings that fail the check."""
        return [finding for finding in self.findings if finding.severity == "error"]
