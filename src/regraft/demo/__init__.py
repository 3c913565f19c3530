"""The embedded demo, on a real model and real texts that are read from published wheels."""
