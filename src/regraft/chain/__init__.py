"""Upgrade chains: adaptations carried along a series of bases, hop by hop or at once."""

from regraft.chain.file import Chain
from regraft.chain.record import ChainRow, read_chain
from regraft.chain.run import run_chain
from regraft.chain.summary import RouteSummary, summarise_routes

__all__ = ["Chain", "ChainRow", "RouteSummary", "read_chain", "run_chain", "summarise_routes"]
