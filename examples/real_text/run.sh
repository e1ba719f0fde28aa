#!/usr/bin/env bash
# The whole pipeline on real text, through the command line: base model, language space, ShifCon and plain QLoRA,
# evaluation on held-out articles and MGSM questions, report.
#
#   ./run.sh [folder of the real text]        (default: $SHIFCON_DATA, else ../../../shared/data)
#
# EPOCHS, STEPS and QUESTIONS shorten it, to see that it runs: EPOCHS=0.2 STEPS=5 QUESTIONS=5 ./run.sh
set -euo pipefail
cd "$(dirname "$0")"
data="${1:-${SHIFCON_DATA:-../../../shared/data}}"
steps=(${STEPS:+--max-steps "$STEPS"})

[ -f out/base/config.json ] || python base_model.py --data "$data" --output out --epochs "${EPOCHS:-2}"
head -n "${QUESTIONS:-200}" out/questions.jsonl > out/asked.jsonl
shifcon profile --model out/base --parallel out/parallel.jsonl --output out/space --max-length 256
shifcon train --config plain.yaml --overwrite "${steps[@]}"
shifcon train --config shifcon.yaml --overwrite "${steps[@]}"
shifcon evaluate --model out/run --against out/plain \
	--parallel out/parallel_dev.jsonl --questions out/asked.jsonl \
	--max-new-tokens 48 --output out/evaluation
shifcon report out/evaluation
