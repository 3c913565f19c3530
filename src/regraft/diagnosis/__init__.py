"""Questions asked of an upgrade, one file each."""

from regraft.diagnosis.blend import Blend
from regraft.diagnosis.check import Check, check, check_pair
from regraft.diagnosis.compatibility import Point, compatibility
from regraft.diagnosis.connectivity import Plane, Segment, barrier, plane, segment
from regraft.diagnosis.deep import Diagnosis, Questions, diagnose
from regraft.diagnosis.kept import Kept, kept
from regraft.diagnosis.pair import Pair, load_pair
from regraft.diagnosis.regressions import Regressions, calibration, mcnemar, noise_floor, regressions
from regraft.diagnosis.shift import Shift, shift
from regraft.diagnosis.similarity import Control, Map, Similarity, similarity
from regraft.diagnosis.verdict import Verdict, probe_gain, verdict

__all__ = [
    "Blend",
    "Check",
    "Control",
    "Diagnosis",
    "Kept",
    "Map",
    "Pair",
    "Plane",
    "Point",
    "Questions",
    "Regressions",
    "Segment",
    "Shift",
    "Similarity",
    "Verdict",
    "barrier",
    "calibration",
    "check",
    "check_pair",
    "compatibility",
    "diagnose",
    "kept",
    "load_pair",
    "mcnemar",
    "noise_floor",
    "plane",
    "probe_gain",
    "regressions",
    "segment",
    "shift",
    "similarity",
    "verdict",
]
