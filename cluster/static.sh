#!/usr/bin/env bash
# A node of a cluster of machines that are simply there: run it on each, in the folder that holds .venv, and
# end it with Ctrl-C.
#   cluster/static.sh head ADDRESS [options of `ray start`]           on the first, with its own address
#   cluster/static.sh node ADDRESS HEAD [options of `ray start`]      on the others, HEAD the first's address
# Every machine needs the same ~/.ray/auth_token (mode 0600); `head` makes one where there is none.

set -euo pipefail

usage() {
  sed -n '4,5s/^#  //p' "$0" >&2
  exit 2
}

[ "$#" -ge 2 ] || usage
role="$1" own="$2"
shift 2
bin="${MINITRON_RAY_BIN:-$PWD/.venv/bin}"
port="${MINITRON_RAY_PORT:-6379}"   # below 10002, where the ports of Ray's workers begin
token="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"

case "$role" in
  head)
    if [ ! -e "$token" ]; then
      mkdir -p "$(dirname "$token")"
      (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$token")
      echo "made $token; copy it to the other machines, and to where you submit from" >&2
    fi
    where=(--head --port="$port" --dashboard-host=127.0.0.1)
    ;;
  node)
    [ "$#" -ge 1 ] || usage
    where=(--address="$1:$port")
    shift
    ;;
  *) usage ;;
esac
if [ ! -r "$token" ]; then
  echo "$token: no token that can be read; copy the head's to it, mode 0600" >&2
  exit 3
fi
chmod 600 "$token"
exec "$bin/ray" start --block --node-ip-address="$own" --disable-usage-stats "${where[@]}" "$@"
