"""The embedded demo: real models and texts, read in place out of published wheels."""
