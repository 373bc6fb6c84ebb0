"""What a judge does: protocols, verdicts on fresh draws, statistics, tables."""

from ebm_defense.eval.evaluate import evaluate
from ebm_defense.eval.protocol import PROTOCOLS, Protocol, get_protocol
from ebm_defense.eval.report import Report
from ebm_defense.eval.verdict import Judge, Verdict, judge_images

__all__ = [
    "PROTOCOLS",
    "Judge",
    "Protocol",
    "Report",
    "Verdict",
    "evaluate",
    "get_protocol",
    "judge_images",
]
