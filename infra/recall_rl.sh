#!/bin/sh
# Does RL teach to write? For each seed one warm-started policy, and from it each kind of run with the same budget:
#   [CONFIG=recall_asking] infra/recall_rl.sh FOLDER "SEEDS" KIND...
#   infra/recall_rl.sh runs/recall-rl "0 1 2" tmem memory-off && python -m cluster compare runs/recall-rl/*/*/tmem-* runs/recall-rl/*/*/memory-off-*
# Kinds: tmem; controls memory-off, summary, shuffled (siblings exchange their rewards), supervised (the warm start goes on);
# ablations no-preserve (the write), final-delta; of recall_rl no-extraction-credit; of recall_asking by-episode (credit)
# and one-wording (the cards; from a warm start of its own, which taught one wording).
# CONFIG is recall_rl (one fact) or recall_asking (two facts). What FOLDER holds is not run again; a run that was killed goes on.
set -eu
name=${CONFIG:-recall_rl}
config=configs/$name.yaml
only() { # CONFIG KIND WHY
    [ "$name" = "$1" ] || { echo "kind $2 is not one of $name: $3; take CONFIG=$1" >&2 && return 2; }
}
settings_of() {
    case $1 in
    tmem) ;;
    memory-off) # a context of a question and no more: at 54 the end of a session stays; answers are all there is to train
        echo memory.policy=truncation memory.max_context_tokens=24 objective.tokens=both objective.credit=episode \
            sampling.answer_temperature=null ;;
    summary) echo memory.policy=summary memory.max_summary_tokens=24 objective.credit=episode ;;
    shuffled) echo train.control=shuffled_rewards ;;
    supervised) echo train.control=supervised ;;
    no-extraction-credit)
        only recall_rl "$1" "its answers are greedy, so nothing would be left to train" &&
            echo objective.tokens=answers ;;
    final-delta) echo objective.snapshot=final ;;
    by-episode)
        only recall_asking "$1" "its credit is by episode already" &&
            echo objective.credit=episode ;;
    no-preserve) echo write.preserve.weight=0 ;;
    one-wording)
        only recall_asking "$1" "its cards are in one wording already" &&
            echo memory.wordings=1 ;;
    *) echo "kind $1 is not known; the head of this file names them" >&2 && return 2 ;;
    esac
}

[ $# -ge 3 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
folder=$1 seeds=$2
shift 2
for kind in "$@"; do # all of them before anything is trained
    settings=$(settings_of "$kind")
    python -m cluster train "$config" warm_start.steps=0 $settings --print-config > /dev/null
done

for seed in $seeds; do
    for kind in "$@"; do
        if ls "$folder/$kind/seed-$seed/$kind"-*/evaluation/after_rl.json > /dev/null 2>&1; then
            echo "$kind, seed $seed: done before"
            continue
        fi
        start=$folder/start taught=
        [ "$kind" != one-wording ] || start=$folder/start-one-wording taught=$(settings_of "$kind")
        if [ ! -d "$start/policy-$seed" ]; then
            python -m cluster train "$config" name=start output_dir="$start/seed-$seed" seed="$seed" resume=auto \
                train.steps=0 evaluation.tasks=4 evaluation.memory_off_row=false $taught
            python -m cluster export "$(ls -d "$start/seed-$seed"/start-* | tail -n 1)" "$start/policy-$seed"
        fi
        python -m cluster train "$config" name="$kind" output_dir="$folder/$kind/seed-$seed" seed="$seed" resume=auto \
            model.name="$start/policy-$seed" warm_start.steps=0 $(settings_of "$kind")
    done
done
