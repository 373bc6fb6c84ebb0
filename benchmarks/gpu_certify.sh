#!/usr/bin/env bash
# Certifies this machine's GPU: every fast way is checked, timed and broken on purpose, without network,
# in about ten minutes on one H100. Prints one line a step and writes one Markdown file into
# benchmarks/results. Where there is no GPU it runs to its end and names each step that it cannot do.
#
#   benchmarks/gpu_certify.sh                      # PYTHON=… names another interpreter
#   benchmarks/gpu_certify.sh --only checks,speed  # some of the steps
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/benchmarks/gpu_certify.py" "$@"
