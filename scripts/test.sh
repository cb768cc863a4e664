# Sets up what the tests need, and runs them: sh scripts/test.sh [pytest arguments]
set -eu
. "$(dirname "$0")/setup.sh"
install requirements-test "-r requirements-test.txt -r requirements-hf.txt" "$root/requirements-test.txt" \
    "$root/requirements-hf.txt"
cd "$root"
exec "$python" -m pytest "$@"
