"""Questions asked of an upgrade, one file each."""

from regraft.diagnosis.check import Check, check

__all__ = ["Check", "check"]
