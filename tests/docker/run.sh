#!/usr/bin/env bash
# Train with docker/compose.yaml on a real engine: `make test-docker`. Not part of `make test`.
#
# Builds the image, looks into it, starts the bootstrap and three peers, and asserts that all four
# hold the same model in the same rounds; kills one peer, then the bootstrap, and asserts that the
# rest go on, and that the bootstrap comes back as the same peer. Takes down everything that it
# started. COMPOSE="docker compose" selects the newer command.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${COMPOSE:-}" ]; then
    if command -v docker-compose >/dev/null; then COMPOSE=docker-compose; else COMPOSE="docker compose"; fi
fi
project=shoal-test-$$
compose() { $COMPOSE -p "$project" -f docker/compose.yaml -f tests/docker/json.yaml "$@"; }
say() { echo "test-docker: $*"; }
fail() {
    say "FAILED: $*" >&2
    compose logs --no-color --tail=40 >&2 || true
    exit 1
}

docker info >/dev/null 2>&1 || { echo "test-docker: no Docker engine answers: start one first" >&2; exit 2; }
trap 'compose down --volumes --timeout 10 >/dev/null 2>&1 || true' EXIT

container() { compose ps -q "$1"; } # one line per container of the service
rounds() { docker logs "$1" 2>/dev/null | grep '"event": *"round"' || true; }
newest() { rounds "$1" | tail -n 1 | sed -n 's/.*"round": *\([0-9]*\).*/\1/p'; }
digest() { rounds "$1" | grep "\"round\": *$2[,}]" | tail -n 1 | sed -n 's/.*"digest": *"\([^"]*\)".*/\1/p'; }

# until SECONDS WHAT COMMAND...: poll, because the thing waited for is in another container
until_true() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || fail "$what"
        sleep 1
    done
}
has_reached() { # ROUND CONTAINER...
    local round=$1 id at
    shift
    for id in "$@"; do
        at=$(newest "$id")
        [ -n "$at" ] && [ "$at" -ge "$round" ] || return 1
    done
}
agree_on() { # ROUND CONTAINER...
    local round=$1 id one first
    shift
    first=$(digest "$1" "$round")
    [ -n "$first" ] || fail "round $round has no digest in $1"
    for id in "$@"; do
        one=$(digest "$id" "$round")
        [ "$one" = "$first" ] || fail "round $round: $id holds '$one', another peer '$first'"
    done
    say "round $round: $# peers hold $first"
}
healthy() { [ "$(docker inspect -f '{{.State.Health.Status}}' "$1")" = healthy ]; }

say "building"
compose build --quiet

image=shoal
look() { docker run --rm --network none --entrypoint sh "$image" -c "$1"; }
[ "$(look 'id -u')" != 0 ] || fail "the image runs as root"
for tool in gcc cc g++ c++ clang tcc ld as; do
    ! look "command -v $tool" >/dev/null || fail "the image holds $tool"
done
case $(look 'python -c "import torch; print(torch.version.cuda)"') in
    None) ;;
    *) fail "the CPU image holds a CUDA build of torch" ;;
esac
say "image: not root, no compiler, torch for the CPU, $(docker image inspect -f '{{.Size}}' "$image" | awk '{printf "%.2f GB", $1 / 1e9}')"

compose up -d --scale peer=3
bootstrap=$(container bootstrap)
mapfile -t peers < <(container peer)
[ "${#peers[@]}" = 3 ] || fail "${#peers[@]} peers were started, not 3"
healthy "$bootstrap" || fail "peers were started before the bootstrap was healthy"

until_true 180 "the four do not train together" has_reached 3 "$bootstrap" "${peers[@]}"
start=0
for id in "${peers[@]}"; do
    at=$(newest "$id")
    if [ "$at" -gt "$start" ]; then start=$at; fi
done
until_true 90 "the four stopped training" has_reached $((start + 2)) "$bootstrap" "${peers[@]}"
agree_on $((start + 1)) "$bootstrap" "${peers[@]}"
agree_on $((start + 2)) "$bootstrap" "${peers[@]}"

victim=${peers[0]}
rest=("$bootstrap" "${peers[@]:1}")
docker kill "$victim" >/dev/null
at=$(newest "$bootstrap")
say "killed one peer in round $at"
until_true 120 "the rest stopped when one peer was killed" has_reached $((at + 3)) "${rest[@]}"
agree_on $((at + 3)) "${rest[@]}"

peer_id() { docker logs "$1" 2>/dev/null | sed -n 's/.*"peer": *"\([^"]*\)".*/\1/p' | tail -n 1; }
before=$(peer_id "$bootstrap")
docker kill "$bootstrap" >/dev/null
at=$(newest "${peers[1]}")
say "killed the bootstrap in round $at"
until_true 120 "the rest stopped when the bootstrap was killed" has_reached $((at + 3)) "${peers[@]:1}"
agree_on $((at + 3)) "${peers[@]:1}"

since=$(date +%s)
docker start "$bootstrap" >/dev/null
until_true 120 "the bootstrap does not come back" healthy "$bootstrap"
[ "$(peer_id "$bootstrap")" = "$before" ] || fail "the bootstrap came back as another peer"
say "the bootstrap is back as $before after $(($(date +%s) - since)) s"

compose stop --timeout 30 >/dev/null 2>&1
for id in "${peers[@]:1}" "$bootstrap"; do
    code=$(docker inspect -f '{{.State.ExitCode}}' "$id")
    [ "$code" = 0 ] || fail "a peer told to stop exited with status $code"
done
say "passed"
