#!/bin/sh
# Prints the Secret `laps-redis` with new passwords, for a Redis of components/redis:
#
#     sh make-secret.sh | kubectl apply --namespace laps --filename -
#
# An argument is taken for both passwords. Redis gets only their hashes. SCHEME=rediss where components/redis-tls is.
set -eu
new_password() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
hash() { printf %s "$1" | sha256sum | cut -d' ' -f1; }
laps=${1:-$(new_password)}
operator=${1:-$(new_password)}
cat <<END
apiVersion: v1
kind: Secret
metadata:
  name: laps-redis
type: Opaque
stringData:
  LAPS_REDIS_URL: ${SCHEME:-redis}://laps:$laps@redis:6379/0
  operator-password: $operator
  # laps: what a scheduler calls, on the keys of pools alone; it cannot empty the server or its functions.
  # operator: a person who looks. probe: may ask whether the server answers.
  users.acl: |
    user default off resetchannels -@all
    user laps on #$(hash "$laps") ~laps:* resetchannels -@all +@connection +@read +@write -@dangerous -@scripting +fcall +fcall_ro +function|list +function|load +info +config|get +time
    user operator on #$(hash "$operator") ~laps:* resetchannels -@all +@connection +@read -@dangerous +fcall_ro +info +function|list +config|get +slowlog|get +time
    user probe on nopass resetchannels -@all +ping
END
