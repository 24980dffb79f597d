#!/bin/sh
# The third tier of proof, `make proof`: what takes hours. It can be stopped and started again.
#   infra/proof.sh [FOLDER [STAGE...]]      FOLDER: runs/proof      stages: kernels quickstart chat kills chaos studies rl
# A stage that ended well leaves FOLDER/STAGE.done with commit and seconds, and is not run again.
set -eu
folder=${1:-runs/proof}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- kernels quickstart chat kills chaos studies rl
studies="write addressed neighbours supervision basis steps sensitivity capacity capacity_writes forgetting"

kernels() { # vLLM's LoRA kernels for GPUs, in Triton's interpreter; the stages of the smoke test, RL step and all
    make -s triton
    python -m pytest -n 0 tests/integration/test_gpu_kernels.py
    python -m tests.gpu.smoke environment writer eager learner rl
}
quickstart() {
    python -m cluster train configs/quickstart.yaml name=quickstart output_dir="$folder" resume=auto
}
chat() {
    run=$(ls -d "$folder"/quickstart-2* | tail -n 1) # a training's folder: name and time
    [ -n "$run" ] || { echo "proof: chat needs the stage quickstart first" >&2 && exit 1; }
    # four facts in four turns, then the same in other words, then two strangers
    printf '%s\n' "Elena was born on April 10." "Walter works as a dentist." "Olivia adopted a hedgehog." \
        "Nathan plays the cello." /write "On which day was Elena born?" "What kind of work does Walter do?" \
        "What animal does Olivia keep?" "Which instrument does Nathan practice?" "Where does Zoe live?" \
        "What is Patrick's job?" | python -m cluster chat "$run" > "$folder/chat.txt"
    grep '^agent>' "$folder/chat.txt" | tail -n 6 | awk '
        BEGIN { split("April 10,dentist,hedgehog,cello", told, ",") }
        NR <= 4 { right += index($0, told[NR]) > 0 }
        NR > 4 { for (i in told) leaked += index($0, told[i]) > 0 }
        END { print right + 0 " of 4 right in other words, " leaked + 0 " of 2 strangers got a told answer"
              exit !(right >= 3 && leaked == 0) }'
}
kills() { # 200 of each kind of file, and runs of 100,000 steps
    ENGRAM_KILLS=200 ENGRAM_STEPS=100000 \
        python -m pytest -n 0 tests/unit/test_killed_lives.py tests/unit/test_killed_saves.py tests/unit/test_long_runs.py
}
chaos() {
    python -m tests.chaos.trials --trials 20 --seed 0 --output "$folder/chaos.md"
}
studies() {
    for study in $studies; do
        [ -e "$folder/study-$study.done" ] && continue
        python -m cluster probe configs/quickstart.yaml --study "$study" output_dir="$folder"
        touch "$folder/study-$study.done"
    done
}
rl() {
    infra/recall_rl.sh "$folder/recall-rl" "0 1 2" tmem memory-off no-extraction-credit final-delta
    python -m cluster compare "$folder"/recall-rl/*/*/tmem-* "$folder"/recall-rl/*/*/memory-off-* > "$folder/rl.txt"
    cat "$folder/rl.txt"
}

mkdir -p "$folder"
for stage in "$@"; do
    case $stage in
    kernels | quickstart | chat | kills | chaos | studies | rl) ;;
    *) echo "stage $stage is not known: kernels, quickstart, chat, kills, chaos, studies or rl" >&2 && exit 2 ;;
    esac
    if [ -e "$folder/$stage.done" ]; then
        echo "proof: $stage was done before: $(cat "$folder/$stage.done")"
        continue
    fi
    began=$(date +%s)
    echo "proof: $stage begins"
    "$stage"
    echo "commit $(git describe --always --dirty --exclude='*'), $(($(date +%s) - began)) s" > "$folder/$stage.done"
    echo "proof: $stage ended well: $(cat "$folder/$stage.done")"
done
