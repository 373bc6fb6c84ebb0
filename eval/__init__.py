"""What a judge does: protocols, verdicts on fresh draws, statistics, tables."""

from ebm_defense.eval.evaluate import evaluate
from ebm_defense.eval.flags import Flag
from ebm_defense.eval.plain import load_protocol
from ebm_defense.eval.protocol import PROTOCOLS, Protocol, get_protocol
from ebm_defense.eval.report import Report
from ebm_defense.eval.rules import OneStage, TwoStage
from ebm_defense.eval.sequential import Sequential
from ebm_defense.eval.statistics import over_seeds, paired, share, worst_of
from ebm_defense.eval.verdict import Judge, Verdict, judge_images

__all__ = [
    "PROTOCOLS",
    "Flag",
    "Judge",
    "OneStage",
    "Protocol",
    "Report",
    "Sequential",
    "TwoStage",
    "Verdict",
    "evaluate",
    "get_protocol",
    "judge_images",
    "load_protocol",
    "over_seeds",
    "paired",
    "share",
    "worst_of",
]
