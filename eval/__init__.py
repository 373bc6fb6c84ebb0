"""What a judge does: protocols, verdicts on fresh draws, statistics, tables."""

from ebm_defense.eval.benchmark import Benchmark, benchmark
from ebm_defense.eval.compare import Comparison, compare
from ebm_defense.eval.evaluate import evaluate
from ebm_defense.eval.merge import merge
from ebm_defense.eval.protocol import PROTOCOLS, Protocol, get_protocol
from ebm_defense.eval.reading import load_run
from ebm_defense.eval.report import Report
from ebm_defense.eval.reverify import Verification, reverify
from ebm_defense.eval.verdict import Judge, Verdict, judge_images
from ebm_defense.eval.workers import Workers

__all__ = [
    "PROTOCOLS",
    "Benchmark",
    "Comparison",
    "Judge",
    "Protocol",
    "Report",
    "Verdict",
    "Verification",
    "Workers",
    "benchmark",
    "compare",
    "evaluate",
    "get_protocol",
    "judge_images",
    "load_run",
    "merge",
    "reverify",
]
