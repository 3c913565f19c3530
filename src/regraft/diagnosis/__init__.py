"""Questions asked of an upgrade, one file each."""

from regraft.diagnosis.blend import Blend
from regraft.diagnosis.check import Check, check, check_pair
from regraft.diagnosis.compatibility import Point, compatibility
from regraft.diagnosis.connectivity import Segment, barrier, segment
from regraft.diagnosis.deep import diagnose
from regraft.diagnosis.pair import Pair, load_pair
from regraft.diagnosis.plane import Plane, plane
from regraft.diagnosis.probe import probe_gain
from regraft.diagnosis.question import Question, Questions, all_questions
from regraft.diagnosis.record import Diagnosis, read_diagnosis
from regraft.diagnosis.regressions import Regressions, mcnemar, noise_floor, regressions
from regraft.diagnosis.retention import Kept, kept
from regraft.diagnosis.shift import Shift, shift
from regraft.diagnosis.similarity import Control, Map, Similarity, similarity
from regraft.diagnosis.verdict import Verdict, verdict

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
    "Question",
    "Questions",
    "Regressions",
    "Segment",
    "Shift",
    "Similarity",
    "Verdict",
    "barrier",
    "check",
    "check_pair",
    "compatibility",
    "diagnose",
    "all_questions",
    "kept",
    "load_pair",
    "mcnemar",
    "noise_floor",
    "plane",
    "probe_gain",
    "read_diagnosis",
    "regressions",
    "segment",
    "shift",
    "similarity",
    "verdict",
]
