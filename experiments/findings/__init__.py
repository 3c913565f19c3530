"""The paper's experiments, one file each: what it tunes, what it measures, and which findings hold."""
