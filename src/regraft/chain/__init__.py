"""Upgrade chains: adaptations carried from base to base to base, hop by hop or at once."""

from regraft.chain.file import Chain
from regraft.chain.run import Chained, run_chain
from regraft.chain.standing import Standing, read_chain, standings

__all__ = ["Chain", "Chained", "Standing", "read_chain", "run_chain", "standings"]
