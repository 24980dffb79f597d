#!/bin/sh
# The evidence that RL teaches to write: for each seed one warm-started policy, and from it each kind of run with the same budget.
#   infra/recall_rl.sh FOLDER "SEEDS" KIND...        kinds: tmem memory-off no-extraction-credit final-delta
#   infra/recall_rl.sh runs/recall-rl "0 1 2" tmem memory-off && python -m cluster pool runs/recall-rl/*/*/tmem-* runs/recall-rl/*/*/memory-off-*
# What stands in FOLDER is not run again; a run that was killed goes on.
set -eu
folder=$1 seeds=$2
shift 2
train="python -m cluster train configs/recall_rl.yaml"
for seed in $seeds; do
    start=$folder/start/policy-$seed
    if [ ! -d "$start" ]; then
        $train name=start output_dir="$folder/start/seed-$seed" seed="$seed" resume=auto train.steps=0 evaluation.tasks=4 evaluation.memory_off_row=false
        python -m cluster export "$folder/start/seed-$seed"/start-* "$start"
    fi
    for kind in "$@"; do
        case $kind in
        tmem) set_=objective.credit=all ;;
        memory-off) set_=memory.policy=truncation ;;
        no-extraction-credit) set_=objective.credit=actions ;;
        final-delta) set_=objective.snapshot=final ;;
        *) echo "kind $kind is not known: tmem, memory-off, no-extraction-credit or final-delta" >&2 && exit 2 ;;
        esac
        $train name="$kind" output_dir="$folder/$kind/seed-$seed" seed="$seed" resume=auto model.name="$start" warm_start.steps=0 "$set_"
    done
done
