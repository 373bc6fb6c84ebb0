"""What a judge does: protocols, verdicts on fresh draws, statistics, tables."""

from ebm_defense.eval.benchmark import Benchmark, benchmark
from ebm_defense.eval.evaluate import evaluate
from ebm_defense.eval.judging.judge import Judge, Judgement, Verdict, judge_images
from ebm_defense.eval.judging.rules import AsDeployed, OneStage, TwoStage
from ebm_defense.eval.judging.selection import Selection
from ebm_defense.eval.judging.sequential import Sequential
from ebm_defense.eval.judging.statistics import over_seeds, paired, share, worst_of
from ebm_defense.eval.load_run import load_run
from ebm_defense.eval.merge import merge
from ebm_defense.eval.protocols.protocol import PROTOCOLS, Protocol, get_protocol, load_protocol
from ebm_defense.eval.reporting.compare import Comparison, compare
from ebm_defense.eval.reporting.flags.evidence import Flag
from ebm_defense.eval.reporting.report import Report
from ebm_defense.eval.reporting.verification import Verification
from ebm_defense.eval.reverify import reverify
from ebm_defense.eval.running.workers import Workers

__all__ = [
    "PROTOCOLS",
    "AsDeployed",
    "Benchmark",
    "Comparison",
    "Flag",
    "Judge",
    "Judgement",
    "OneStage",
    "Protocol",
    "Report",
    "Selection",
    "Sequential",
    "TwoStage",
    "Verdict",
    "Verification",
    "Workers",
    "benchmark",
    "compare",
    "evaluate",
    "get_protocol",
    "judge_images",
    "load_protocol",
    "load_run",
    "merge",
    "over_seeds",
    "paired",
    "reverify",
    "share",
    "worst_of",
]
