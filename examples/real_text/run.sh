#!/usr/bin/env bash
# The whole pipeline on real text, through the command line: base model, language space, ShifCon and plain QLoRA,
# evaluation on held-out articles and MGSM questions, report.
#
#   ./run.sh [folder of the real text]        (default: ../../../shared/data)
set -euo pipefail
cd "$(dirname "$0")"
data="${1:-${SHIFCON_DATA:-../../../shared/data}}"

[ -f work/base/config.json ] || python base_model.py --data "$data" --output work
shifcon profile --model work/base --parallel work/parallel.jsonl --output work/space --max-length 256
shifcon train --config plain.yaml --overwrite
shifcon train --config shifcon.yaml --overwrite
shifcon evaluate --model work/run --against work/plain \
	--parallel work/parallel_dev.jsonl --questions work/questions.jsonl \
	--max-new-tokens 48 --output work/evaluation
shifcon report work/evaluation
