#!/usr/bin/env bash
# Train with docker/compose.yaml on a real engine: `make test-docker`. Not part of `make test`.
#
# Builds the image and looks into it; starts the bootstrap and three peers, kills a peer, kills the
# bootstrap, starts that again, scales up, stops. After each step the peers that are up must finish
# rounds together, and over the whole test no round may have two digests in any two logs. Takes down
# everything that it started, also when it fails or is interrupted; the image stays.
# COMPOSE="docker compose" selects the newer command.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${COMPOSE:-}" ]; then
    if command -v docker-compose >/dev/null; then COMPOSE=docker-compose; else COMPOSE="docker compose"; fi
fi
image=shoal
project=shoal-test-$$
began=$SECONDS
compose() { $COMPOSE -p "$project" -f docker/compose.yaml -f tests/docker/overlay.yaml "$@"; }
say() { printf 'test-docker: %3d s: %s\n' $((SECONDS - began)) "$*"; }
fail() {
    say "FAILED: $*" >&2
    compose ps >&2 || true
    docker inspect -f '{{range .State.Health.Log}}{{.ExitCode}} {{.Output}}{{end}}' "${bootstrap:-none}" >&2 || true # what the health check said
    compose logs --no-color --timestamps --tail=40 >&2 || true
    exit 1
}

docker info >/dev/null 2>&1 || { echo "test-docker: no Docker engine answers: start one first" >&2; exit 2; }

clean_up() {
    trap '' INT TERM HUP # a second Ctrl-C must not leave half of it standing
    docker rm --force "$project-look" >/dev/null 2>&1 || true
    compose down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1 || true
    local left
    left=$(
        docker ps --all --quiet --filter "name=$project"
        docker volume ls --quiet --filter "name=$project"
        docker network ls --quiet --filter "name=$project"
    )
    if [ -n "$left" ]; then echo "test-docker: still there: $left" >&2; fi
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# What the containers tell: their --json lines.
container() { compose ps -q "$1"; } # one line per container of the service
field() { sed -n "s/.*\"$1\": *\"\\{0,1\\}\\([^\",}]*\\).*/\\1/p"; }
events() { docker logs "$2" 2>/dev/null | grep "\"event\": *\"$1\"" || true; } # KIND CONTAINER
newest() { events round "$1" | tail -n 1 | field round; }
in_round() { events round "$2" | grep "\"round\": *$1," | tail -n 1; } # ROUND CONTAINER
peer_id() { events link "$1" | tail -n 1 | field peer; }
healthy() { [ "$(docker inspect -f '{{.State.Health.Status}}' "$1")" = healthy ]; }

latest() { # CONTAINER...: the newest round that any of them has finished
    local id at most=-1
    for id in "$@"; do
        at=$(newest "$id")
        if [ "${at:--1}" -gt "$most" ]; then most=$at; fi
    done
    echo "$most"
}

# until_true SECONDS WHAT COMMAND...: poll, because what is waited for is in another container
until_true() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || fail "$what"
        sleep 1
    done
}

# together AFTER CONTAINER...: they, and nobody else, finished the same round after round AFTER
together() {
    local after=$1 round last id line one digest
    shift
    last=$(newest "$1")
    for ((round = after + 1; round <= ${last:--1}; round++)); do
        digest=
        for id in "$@"; do
            line=$(in_round "$round" "$id") || continue 2
            [ "$(field members <<<"$line")" = $# ] || continue 2
            one=$(field digest <<<"$line")
            [ "${digest:=$one}" = "$one" ] || fail "round $round: $id holds $one, another peer $digest"
        done
        say "round $round: $# members, one digest ${digest:0:12}, loss $(field val_loss <<<"$line" | cut -c1-5)"
        return 0
    done
    return 1
}

one_digest_per_round() { # over all logs, those of killed containers included
    local id all
    all=$(for id in $(compose ps -q); do
        events round "$id" | sed -n 's/.*"round": *\([0-9]*\).*"digest": *"\([^"]*\)".*/\1 \2/p'
    done | sort -n)
    [ -n "$all" ] || fail "nobody finished a round"
    uniq <<<"$all" | awk '++seen[$1] > 1 { print $1; bad = 1 } END { exit bad }' >&2 ||
        fail "more than one digest in the rounds above"
    say "$(cut -d' ' -f1 <<<"$all" | uniq | wc -l) rounds, $(wc -l <<<"$all") reports of them, one digest per round"
}

say "building"
compose build --force-rm >/dev/null 2>"${TMPDIR:-/tmp}/$project.log" ||
    { cat "${TMPDIR:-/tmp}/$project.log" >&2; rm "${TMPDIR:-/tmp}/$project.log"; exit 1; }
rm "${TMPDIR:-/tmp}/$project.log"
say "built; the clock starts here"
began=$SECONDS

seen=$(docker run --rm --init --network none --name "$project-look" --entrypoint sh "$image" -c '
    for tool in gcc cc g++ c++ clang tcc ld as make; do
        command -v $tool >/dev/null && echo "the image holds $tool"
    done
    [ "$(id -u)" != 0 ] || echo "the image runs as root"
    touch /opt/shoal/x /usr/local/bin/x 2>/dev/null && echo "the image may change its own programs"
    python -c "import torch; torch.version.cuda and print(\"the CPU image holds torch for CUDA\")"')
[ -z "$seen" ] || fail "$seen"
say "image: not root, no compiler, torch for the CPU, $(docker image inspect -f '{{.Size}}' "$image" | awk '{printf "%.2f GB", $1 / 1e9}')"

compose up -d --scale peer=3 >/dev/null 2>&1 || fail "compose up"
bootstrap=$(container bootstrap)
mapfile -t peers < <(container peer)
[ "${#peers[@]}" = 3 ] || fail "${#peers[@]} peers were started, not 3"
healthy "$bootstrap" || fail "peers were started before the bootstrap was healthy"
say "the bootstrap is healthy, three peers are started"
for id in "$bootstrap" "${peers[@]}"; do
    [ "$(docker exec "$id" id -u)" != 0 ] || fail "a peer runs as root"
done

until_true 180 "the four do not train together" together -1 "$bootstrap" "${peers[@]}"
at=$(latest "$bootstrap" "${peers[@]}")
until_true 180 "the four stopped training" together "$at" "$bootstrap" "${peers[@]}"

victim=${peers[0]}
rest=("${peers[@]:1}")
docker kill --signal KILL "$victim" >/dev/null
at=$(latest "$bootstrap" "${rest[@]}")
say "killed a peer after round $at"
until_true 180 "the rest stopped when a peer was killed" together "$at" "$bootstrap" "${rest[@]}"

before=$(peer_id "$bootstrap")
docker kill --signal KILL "$bootstrap" >/dev/null
at=$(latest "${rest[@]}")
say "killed the bootstrap after round $at"
until_true 180 "the rest stopped when the bootstrap was killed" together "$at" "${rest[@]}"

docker start "$bootstrap" >/dev/null
at=$(latest "${rest[@]}")
say "started the bootstrap again after round $at"
until_true 180 "the bootstrap does not rejoin the run" together "$at" "$bootstrap" "${rest[@]}"
until_true 180 "the bootstrap does not become healthy again" healthy "$bootstrap"
[ "$(peer_id "$bootstrap")" = "$before" ] || fail "the bootstrap came back as another peer"
[ "$(events link "$bootstrap" | field run | sort -u | wc -l)" = 1 ] || fail "it came back to another run"

# Four peers again: compose starts the killed one and makes a fourth.
compose up -d --scale peer=4 >/dev/null 2>&1 || fail "compose up --scale peer=4"
mapfile -t peers < <(container peer)
[ "${#peers[@]}" = 4 ] || fail "${#peers[@]} peers were started, not 4"
everybody=("$bootstrap" "${peers[@]}")
at=$(latest "${rest[@]}")
say "scaled to four peers after round $at"
until_true 180 "the new peer does not take part" together "$at" "${everybody[@]}"

since=$SECONDS
compose stop >/dev/null 2>&1
for id in "${everybody[@]}"; do
    code=$(docker inspect -f '{{.State.ExitCode}}' "$id")
    [ "$code" = 0 ] || fail "a peer told to stop exited with status $code"
    events left "$id" | grep -q . || fail "a peer told to stop said no farewell"
done
say "all stopped politely in $((SECONDS - since)) s"

one_digest_per_round
first=$(in_round 0 "$bootstrap" | field val_loss)
last=$(in_round "$(newest "$bootstrap")" "$bootstrap" | field val_loss)
awk -v first="$first" -v last="$last" 'BEGIN { exit !(last < first - 0.8) }' ||
    fail "the loss went from $first to $last only"
for id in "${everybody[@]}"; do
    ! docker logs "$id" 2>&1 | grep -B5 -A20 Traceback || fail "a traceback in a log"
done
say "passed: loss from ${first:0:5} to ${last:0:5}"
