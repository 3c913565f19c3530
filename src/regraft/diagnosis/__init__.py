"""The diagnosis of an upgrade: one module per question."""

from regraft.diagnosis.blend import Blend
from regraft.diagnosis.check import Check, check, check_pair
from regraft.diagnosis.compatibility import CompatibilityPoint, compatibility
from regraft.diagnosis.connectivity import Segment, barrier, segment
from regraft.diagnosis.deep import diagnose
from regraft.diagnosis.knowledge import Knowledge, ModelKnowledge, measure_knowledge
from regraft.diagnosis.pair import DeploymentPair, load_pair
from regraft.diagnosis.plane import Plane, plane
from regraft.diagnosis.probe import probe_gain
from regraft.diagnosis.question import Question, Questions, all_questions
from regraft.diagnosis.record import Diagnosis, read_diagnosis
from regraft.diagnosis.regressions import Regressions, mcnemar, noise_floor, regressions
from regraft.diagnosis.retention import Retention, retention
from regraft.diagnosis.samples import SampleComparison, compare_samples
from regraft.diagnosis.shift import Shift, shift
from regraft.diagnosis.similarity import AttentionMap, Control, Similarity, similarity
from regraft.diagnosis.verdict import Verdict, verdict

__all__ = [
    "AttentionMap",
    "Blend",
    "Check",
    "CompatibilityPoint",
    "Control",
    "DeploymentPair",
    "Diagnosis",
    "Knowledge",
    "ModelKnowledge",
    "Plane",
    "Question",
    "Questions",
    "Regressions",
    "Retention",
    "SampleComparison",
    "Segment",
    "Shift",
    "Similarity",
    "Verdict",
    "all_questions",
    "barrier",
    "check",
    "check_pair",
    "compare_samples",
    "compatibility",
    "diagnose",
    "load_pair",
    "mcnemar",
    "measure_knowledge",
    "noise_floor",
    "plane",
    "probe_gain",
    "read_diagnosis",
    "regressions",
    "retention",
    "segment",
    "shift",
    "similarity",
    "verdict",
]
