#!/bin/sh
# Does RL teach to write? For each seed one warm-started policy, and from it each kind of run with the same budget:
#   [CONFIG=recall_asking] infra/recall_rl.sh FOLDER "SEEDS" KIND...
#   infra/recall_rl.sh runs/recall-rl "0 1 2" tmem memory-off && python -m cluster compare runs/recall-rl/*/*/tmem-* runs/recall-rl/*/*/memory-off-*
# Kinds: tmem; controls memory-off, summary, shuffled (siblings exchange their rewards), supervised (the warm start goes on);
# ablations no-extraction-credit, final-delta, by-episode (credit), no-preserve (the write), one-wording (the cards).
# CONFIG is recall_rl (one fact) or recall_asking (two facts). What FOLDER holds is not run again; a run that was killed goes on.
set -eu
config=configs/${CONFIG:-recall_rl}.yaml
settings_of() {
    case $1 in
    tmem) ;;
    memory-off) echo memory.policy=truncation memory.max_context_tokens=24 ;; # a question and no more: at 54 the end of a session stays
    summary) echo memory.policy=summary objective.credit=episode ;;
    shuffled) echo train.control=shuffled_rewards objective.credit=episode ;;
    supervised) echo train.control=supervised ;;
    no-extraction-credit) echo objective.tokens=answers ;;
    final-delta) echo objective.snapshot=final ;;
    by-episode) echo objective.credit=episode ;;
    no-preserve) echo write.preserve.weight=0 ;;
    one-wording) echo memory.wordings=1 ;;
    *) echo "kind $1 is not known; the head of this file names them" >&2 && return 2 ;;
    esac
}

[ $# -ge 3 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
folder=$1 seeds=$2
shift 2
for kind in "$@"; do settings_of "$kind" > /dev/null; done

for seed in $seeds; do
    start=$folder/start/policy-$seed
    if [ ! -d "$start" ]; then
        python -m cluster train "$config" name=start output_dir="$folder/start/seed-$seed" seed="$seed" resume=auto \
            train.steps=0 evaluation.tasks=4 evaluation.memory_off_row=false
        python -m cluster export "$(ls -d "$folder/start/seed-$seed"/start-* | tail -n 1)" "$start"
    fi
    for kind in "$@"; do
        if ls "$folder/$kind/seed-$seed/$kind"-*/evaluation/after_rl.json > /dev/null 2>&1; then
            echo "$kind, seed $seed: done before"
            continue
        fi
        python -m cluster train "$config" name="$kind" output_dir="$folder/$kind/seed-$seed" seed="$seed" resume=auto \
            model.name="$start" warm_start.steps=0 $(settings_of "$kind")
    done
done
